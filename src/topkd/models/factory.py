"""Models by name: built-in, torchvision, timm and user-defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from topkd._runtime.imports import imported
from topkd.features import FeatureExtractor
from topkd.models.feature_info import taps_of
from topkd.models.found import taps_by_running
from topkd.models.registry import MODELS, Model

OBJECT = "object:"  # prefix of networks and data that were given as Python objects
_ORIGINS = ("torchvision", "timm")
_WIDTHS = (
    "classes",
    "num_classes",
    "n_classes",
    "nb_classes",
    "num_class",
)
_AUXILIARY = ("googlenet", "inception_v3")  # torchvision models with auxiliary outputs


@dataclass(frozen=True)
class Published:
    """Metadata of published weights."""

    classes: int
    size: int  # input height and width, in pixels
    mean: tuple[float, float, float]  # of the normalization
    std: tuple[float, float, float]


@dataclass(frozen=True)
class ExternalModel(Model):
    """A model from outside topkd, called with classes, size and pretrained."""

    published: Callable[[], Published] | None = None

    def build(self, classes: int) -> FeatureExtractor:
        """Builds an untrained network with the taps of its family."""
        return _tapped(self.about, self.network(classes, None, False), None, {})


def find(name: str) -> Model:
    """Finds a model by its name.

    Args:
        name: One of :data:`topkd.models.MODELS`; ``torchvision:NAME`` or ``timm:NAME``, optionally
            followed by a dot and the name of the weights; or ``module:callable``, of an installed
            module or one in the current folder. It is called with ``classes=`` or
            ``num_classes=``, and with ``size=``, if it has these parameters.

    Raises:
        ValueError: If there is none of this name, or its package is not installed.

    Examples:
        >>> find("resnet20").about
        'CIFAR ResNet with 20 layers, 64-dimensional embedding'
        >>> find("torchvision:resnet18").build(10).maps
        ('relu', 'layer1', 'layer2', 'layer3', 'layer4')
    """
    if name in MODELS:
        return MODELS[name]
    origin, colon, rest = name.partition(":")
    if not colon:
        raise ValueError(
            f"there is no {name!r}{_near(name, MODELS)} "
            "Others are named torchvision:NAME, timm:NAME or MODULE:CALLABLE"
        )
    if origin == "torchvision":
        return _of_torchvision(rest)
    return _of_timm(rest) if origin == "timm" else _of_user(origin, rest)


def is_own(name: str) -> bool:
    """Returns whether a name is ``module:callable``."""
    return ":" in name and name.split(":")[0] not in _ORIGINS


def refuse_code(model: str, origin: str) -> None:
    """Refuses a file that names its model as MODULE:CALLABLE.

    Such a model imports and runs code, which a file of unknown origin must not trigger. A network
    that was given as a module has no name that could be built.

    Args:
        model: The model that the file names.
        origin: Name of the file, for the message.

    Raises:
        ValueError: If the model is neither built in nor from torchvision or timm.
    """
    if model.startswith(OBJECT):
        raise ValueError(
            f"{origin} has the weights of a network without a name ({model.removeprefix(OBJECT)}); "
            "load it in Python: topkd.load(PATH, network=MODULE)"
        )
    if is_own(model):
        raise ValueError(f"{origin} asks to run {model}; if this is your own code, pass --trust")


def build(
    name: str,
    classes: int,
    size: int | None = None,
    *,
    pretrained: bool = False,
    maps: Sequence[str] | None = None,
    head: str | None = None,
    preactivations: Sequence[str] | None = None,
) -> FeatureExtractor:
    """Builds a network with its taps, untrained or with published weights.

    Args:
        name: See :func:`find`.
        classes: Number of classes. Published weights for another number get a new classifier. A
            user's callable without such a parameter determines it.
        size: Height and width of the images, for networks built for one size; position embeddings
            are interpolated. Defaults to the network's own.
        pretrained: Whether to download the weights that torchvision or timm publish.
        maps: Taps that replace the maps of the family, and its pre-activations as well. A network
            of unknown family is run once to detect maps and head, unless both are given.
        head: Name of the classifier module.
        preactivations: Taps that replace the pre-activations of the family.

    Raises:
        ValueError: If the network is unknown, has no published weights or lacks a named module, or
            if its head is neither known nor given nor detected.
        RuntimeError: If the network has to be run and does not accept images of this size.
        OSError: If weights cannot be downloaded.
    """
    model = find(name)
    given = {"maps": maps, "head": head, "preactivations": preactivations}
    own: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if maps is not None:
        own.setdefault("preactivations", ())
    if pretrained:
        published(name)
    if isinstance(model, ExternalModel):
        shape = None if size is None else (3, size, size)
        return _tapped(name, model.network(classes, size, pretrained), shape, own)
    return FeatureExtractor(model.network(classes=classes), **{**model.taps, **own})


def wrap(
    network: nn.Module,
    name: str | None = None,
    shape: Sequence[int] | None = None,
    *,
    maps: Sequence[str] | None = None,
    head: str | None = None,
    preactivations: Sequence[str] | None = None,
) -> FeatureExtractor:
    """Wraps any classifier to read its embedding and feature maps.

    Networks of a known family have the taps of the family. A network may also have an attribute
    ``taps``, a mapping with ``head``, ``maps`` and ``preactivations``. For others, the classifier
    and the maps are detected by running the network once.

    Args:
        network: The classifier. A :class:`~topkd.features.FeatureExtractor` is returned as it is.
        name: Name for messages. Defaults to the name of its class.
        shape: Channels, height and width of its images. Defaults to three channels and the first
            common size that it accepts.
        maps: Modules to read as feature maps, shallow to deep.
        head: The module that computes the logits; its input is the embedding.
        preactivations: Modules to read as maps before their activation.

    Raises:
        ValueError: If the network lacks a named module, or no head is found.
        RuntimeError: If the network has to be run and does not accept images of this size.

    Examples:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        ...                         nn.Flatten(), nn.Linear(4, 10))
        >>> wrap(network, shape=(3, 8, 8)).maps
        ('1',)
    """
    if isinstance(network, FeatureExtractor):
        return network
    given = {"maps": maps, "head": head, "preactivations": preactivations}
    own: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return _tapped(name or type(network).__name__, network, shape, own)


def published(name: str) -> Published:
    """Returns metadata of the published weights of a model.

    Raises:
        ValueError: If the model is unknown or has no published weights.
    """
    model = find(name)
    if not isinstance(model, ExternalModel) or model.published is None:
        raise ValueError(f"{name!r} has no published weights; models of torchvision and timm have")
    return model.published()


def _tapped(
    name: str, network: nn.Module, shape: Sequence[int] | None, own: dict[str, Any]
) -> FeatureExtractor:
    taps = {**taps_of(network), **getattr(network, "taps", {}), **own}
    missing = [key for key in ("head", "maps") if key not in taps]
    found = _found(name, network, shape, missing) if missing else {}
    if "maps" in taps:  # the detected pre-activations belong to other maps
        found.pop("preactivations", None)
    taps = {"maps": (), **found, **taps}
    if "head" not in taps:
        some = ", ".join(child for child, _ in network.named_children())
        raise ValueError(
            f"no layer of {name} returns its logits: give its head, the module that computes "
            f"logits from embeddings; it has {some}"
        )
    tapped = FeatureExtractor(network, **taps)
    if missing:
        maps = ", ".join(taps["maps"]) or "none"
        tapped.found = (
            f"taps of {name} were detected by running it: head {taps['head']}, maps {maps}"
        )
    return tapped


def _found(
    name: str, network: nn.Module, shape: Sequence[int] | None, missing: Sequence[str]
) -> dict[str, Any]:
    try:
        return taps_by_running(network, shape)
    except (RuntimeError, AssertionError) as error:
        if shape is not None:
            raise
        if "head" in missing:
            raise ValueError(
                f"{name} accepts images of no common size, so its taps cannot be detected: give "
                "its head and its maps"
            ) from error
        return {}


def _near(name: str, names: Iterable[str], otherwise: str = ".") -> str:
    folded = {known.casefold(): known for known in names}
    close = get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
    listed = ", ".join(folded[match] for match in close)
    return f"; did you mean {listed}?" if close else otherwise


# --- torchvision ---------------------------------------------------------------------------------


def _of_torchvision(name: str) -> ExternalModel:
    from torchvision import models

    base, _, tag = name.partition(".")
    names = models.list_models(module=models)
    if base not in names:
        listed = "; `torchvision.models.list_models()` lists all"
        raise ValueError(f"there is no 'torchvision:{name}'{_near(base, names, listed)}")
    tags = [weights.name for weights in models.get_model_weights(base)]
    if tag and tag not in tags:
        raise ValueError(f"torchvision:{base} has no weights {tag!r}; it has {', '.join(tags)}")
    create = partial(_create_torchvision, base, tag or "DEFAULT")
    about = f"torchvision:{name}"
    return ExternalModel(create, {}, about, partial(_published_torchvision, base, tag or "DEFAULT"))


def _published_torchvision(name: str, tag: str) -> Published:
    from torchvision import models

    weights = models.get_model_weights(name)[tag]
    shown = weights.transforms()
    classes, size = len(weights.meta["categories"]), shown.crop_size[0]
    return Published(classes, size, tuple(shown.mean), tuple(shown.std))


def _create_torchvision(
    name: str, tag: str, classes: int, size: int | None, pretrained: bool
) -> Any:
    from torchvision import models

    options: dict[str, Any] = {}
    if name in _AUXILIARY:
        options = {"aux_logits": False} | ({} if pretrained else {"init_weights": True})
    if name.startswith("maxvit"):
        options["input_size"] = (size or 224,) * 2
    if not pretrained:
        if name.startswith("vit_") and size is not None:
            options["image_size"] = size
        return models.get_model(name, num_classes=classes, **options)
    weights = models.get_model_weights(name)[tag]
    # Rejects a file with code; torchvision then reads the same file itself.
    weights.get_state_dict(check_hash=True, weights_only=True)
    network = models.get_model(name, weights=weights, **options)
    if name.startswith("vit_") and size not in (None, network.image_size):
        network = _resized(name, network, size)
    if classes != len(weights.meta["categories"]):
        _replace_head(network, classes)
    return network


def _resized(name: str, network: Any, size: int | None) -> Any:
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    state = interpolate_embeddings(size, network.patch_size, network.state_dict())
    resized = models.get_model(name, num_classes=network.num_classes, image_size=size)
    resized.load_state_dict(state)
    return resized


def _replace_head(network: nn.Module, classes: int) -> None:
    head = taps_of(network).get("head")
    if head is None:
        raise ValueError(f"{type(network).__name__} has no classifier that can be replaced")
    parent, _, name = head.rpartition(".")
    old = network.get_submodule(head)
    assert isinstance(old, nn.Linear)
    setattr(network.get_submodule(parent), name, nn.Linear(old.in_features, classes))


# --- timm ----------------------------------------------------------------------------------------


def _of_timm(name: str) -> ExternalModel:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"timm:{name} needs timm, which is not installed: pip install 'topkd[models]'"
        ) from error

    base, _, tag = name.partition(".")
    names = timm.list_models()
    if base not in names:
        listed = "; `timm.list_models()` lists all"
        raise ValueError(f"there is no 'timm:{name}'{_near(base, names, listed)}")
    tags = [full.partition(".")[2] for full in timm.list_models(f"{base}.*", pretrained=True)]
    if tag and tag not in tags:
        raise ValueError(f"timm:{base} has no weights {tag!r}; it has {', '.join(tags)}")
    metadata = partial(_published_timm, name) if tags or timm.is_model_pretrained(name) else None
    return ExternalModel(partial(_create_timm, name), {}, f"timm:{name}", metadata)


def _published_timm(name: str) -> Published:
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    return Published(
        config.num_classes, config.input_size[-1], tuple(config.mean), tuple(config.std)
    )


def _create_timm(name: str, classes: int, size: int | None, pretrained: bool) -> Any:
    import timm

    config: Any = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size
    fixed = fixed and size not in (None, config.input_size[-1])
    options: dict[str, Any] = {"img_size": size} if fixed else {}
    try:
        network: Any = timm.create_model(
            name, pretrained=pretrained, num_classes=classes, **options
        )
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        own = config.input_size[-1]
        raise ValueError(f"timm:{name} takes images of {own} px only, not of {size}") from error
    if hasattr(network, "set_distilled_training"):  # both heads return logits in training
        network.set_distilled_training(True)
    return network


# --- user-defined --------------------------------------------------------------------------------


def _of_user(module: str, attribute: str) -> ExternalModel:
    name = f"{module}:{attribute}"
    try:
        found = imported(module)
    except (ImportError, SyntaxError) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not f"{module}.".startswith(f"{absent}."):
            raise ValueError(f"{name}: {module} cannot be imported: {error}") from error
        raise ValueError(
            f"{name}: there is no module {absent!r}; is it installed, in the current folder, or on "
            "PYTHONPATH?"
        ) from error
    function = getattr(found, attribute, None)
    if not callable(function):
        names = [known for known in vars(found) if not known.startswith("_")]
        raise ValueError(f"{name}: {module} has no callable {attribute!r}{_near(attribute, names)}")
    needed = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in (*_WIDTHS, "size")
    ]
    if needed:
        raise ValueError(
            f"{name} needs {', '.join(needed)}, but is called with classes and size only; name a "
            "function that sets the rest"
        )
    return ExternalModel(partial(_create_own, name, function), {}, name)


def _create_own(
    name: str,
    function: Callable[..., Any],
    classes: int,
    size: int | None,
    pretrained: bool,
) -> nn.Module:
    takes = inspect.signature(function).parameters
    options = {"size": size} if "size" in takes and size is not None else {}
    width = next((width for width in _WIDTHS if width in takes), None)
    if width is None and any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        network = _created_by_keywords(function, classes, options)
    else:
        network = function(**({} if width is None else {width: classes}), **options)
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returned {type(network).__name__}, not a torch.nn.Module")
    return network


def _created_by_keywords(
    function: Callable[..., Any], classes: int, options: Mapping[str, Any]
) -> Any:
    """Calls a function with ``**kwargs``, trying the usual names for the number of classes."""
    for width in _WIDTHS:
        try:
            return function(**{width: classes}, **options)
        except TypeError as error:
            if f"unexpected keyword argument '{width}'" not in str(error):
                raise
    return function(**options)
