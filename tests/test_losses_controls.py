"""Controls of the losses on shape: random trees, and answers to other images."""

from collections import Counter
from dataclasses import replace
from itertools import islice, product

import pytest
import torch
from reference import topological_losses as reference
from reference.features import CLOUD, answers, batch, bound, features, source_in
from scipy.stats import chisquare
from torch.autograd import gradcheck

from topkd.config.validation import parse_options
from topkd.features import Batch, Features
from topkd.losses import LOSSES
from topkd.losses.controls import batch_tree, random_tree, tree_diagram

LABEL_FREE = {
    "topkd": ("topkd", {}),
    "topkd, image": ("topkd", {"form": "image", "scale": "tree_max"}),
    "wasserstein": ("wasserstein", {}),
    "wasserstein, diagonal": ("wasserstein", {"diagonal": True, "order": 2.0, "scale": "none"}),
    "pce": ("pce", {}),
    "em-pce": ("pce", {"form": "em-pce", "bandwidth": 0.1, "tolerance": 2.0}),
}
LABELED = {
    "edge_matching": ("edge_matching", {}),
    "edge_matching, learned": ("edge_matching", {"scale": "learned", "symmetric": False}),
    "rtd_lite": ("rtd_lite", {}),
    "ultrametric": ("ultrametric", {"order": 2.0}),
}
ALL = LABEL_FREE | LABELED


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_in(tmp_path_factory.mktemp("controls"))


@pytest.fixture
def make(source):
    def build(case, **controls):
        name, options = ALL[case]
        student, teacher = features(3, seed=1), features(5, seed=2)
        return bound(LOSSES[name], student, teacher, source, **options, **controls).double()

    return build


def shown(*index):
    n = len(index)
    return Batch(torch.zeros(n, 3, 8, 8), torch.zeros(n).long(), torch.tensor(index))


def as_edges(tree):
    return [tuple(sorted(edge)) for edge in tree.tolist()]


# --- Random trees --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_tree_is_as_likely_as_every_other(n):
    generator, trees = torch.Generator().manual_seed(0), n ** (n - 2)
    drawn = [as_edges(random_tree(n, generator)) for _ in range(60 * trees)]
    counts = Counter(reference.pruefer(edges, n) for edges in drawn)
    assert len(counts) == trees
    assert chisquare(list(counts.values())).pvalue > 0.01


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_sequences_and_trees_are_told_by_each_other(n):
    for sequence in product(range(n), repeat=n - 2):
        assert reference.pruefer(list(reference.tree_of(sequence, n)), n) == sequence


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_a_random_tree_spans_all_points(n):
    edges = as_edges(random_tree(n, torch.Generator().manual_seed(1)))
    assert len(edges) == n - 1
    reached = {0}
    for _ in range(n):
        reached |= {v for edge in edges if set(edge) & reached for v in edge}
    assert reached == set(range(n))


def test_the_tree_of_a_batch_is_a_function_of_its_images_and_the_epoch():
    images = torch.tensor([7, 3, 30, 12, 5, 9, 1, 20])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))

    def of_images(index, epoch=1):
        return {frozenset(index[edge].tolist()) for edge in batch_tree(shown(*index), epoch)}

    state = torch.get_rng_state()
    assert of_images(images) == of_images(images) == of_images(images[order])
    assert of_images(images) != of_images(images, epoch=2)
    ranks = torch.arange(8)
    assert as_edges(batch_tree(shown(*ranks), 1)) != as_edges(batch_tree(shown(*ranks + 1), 1))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_diagram_of_a_tree_has_the_lengths_of_its_edges(dtype):
    clouds = torch.stack([features(4, seed=s).embedding for s in range(3)]).to(dtype)
    trees = torch.stack([random_tree(CLOUD, torch.Generator().manual_seed(s)) for s in range(3)])
    found = tree_diagram(clouds, trees)
    assert found.sizes == (CLOUD - 1,)
    assert (found.births == 0).all()
    assert found.mask.all()
    for cloud, tree, deaths in zip(clouds, trees, found.deaths, strict=True):
        expected = sorted(reference.lengths(cloud.tolist(), as_edges(tree)))
        assert deaths.tolist() == pytest.approx(expected)
        alone = tree_diagram(cloud, tree)
        assert torch.equal(alone.deaths, deaths)
        assert alone.dimension.tolist() == [0] * (CLOUD - 1)


@pytest.mark.parametrize("case", ALL)
def test_random_edges_leave_a_student_that_equals_its_teacher_alone(make, case):
    teacher = features(5, seed=2)
    loss = make(case, edges="random").requires_grad_(False)
    if case != "edge_matching, learned":  # its teacher is in units of the maximum, its student not
        assert loss(teacher, teacher, batch()).abs() < 1e-10
    assert loss(features(5, seed=1), teacher, batch()) > 1e-6


@pytest.mark.parametrize("case", ALL)
def test_random_edges_are_others_in_every_epoch_and_the_same_again(make, case):
    loss, again = make(case, edges="random"), make(case, edges="random")
    again.load_state_dict(loss.state_dict())
    student, teacher = features(3, seed=1), features(5, seed=2)
    values = []
    for epoch in (1, 2):
        loss.on_epoch_start(epoch)
        again.on_epoch_start(epoch)
        values.append(loss(student, teacher, batch()).item())
        assert again(student, teacher, batch()).item() == values[-1]
    assert values[0] != values[1]


CONTROLS = [
    *((case, {"edges": "random"}) for case in ALL),
    *((case, {"target": "permuted"}) for case in LABELED),
    *((case, {"edges": "random", "target": "permuted"}) for case in LABELED),
    *((case, {"target": target}) for case in LABEL_FREE for target in ("other", "mean")),
    *((case, {"edges": "random", "target": "mean"}) for case in LABEL_FREE),
    *((case, {"edges": "random", "target": "other"}) for case in LABEL_FREE),
]


@pytest.mark.parametrize(("case", "controls"), CONTROLS)
def test_controls_keep_the_contract(make, case, controls):
    loss, student, teacher = make(case, **controls).eval(), features(3, seed=1), features(5, seed=2)
    value = loss(student, teacher, batch())
    assert value.shape == ()
    assert value.isfinite()
    order = torch.randperm(CLOUD)
    shuffled = Batch(*(t[order] for t in (batch().images, batch().target, batch().index)))
    torch.testing.assert_close(
        loss(*(f.apply(lambda t: t[order]) for f in (student, teacher)), shuffled), value
    )
    embedding = student.embedding.requires_grad_()

    def of(embedding):
        return loss(Features(student.logits, embedding), teacher, batch())

    assert gradcheck(of, [embedding], fast_mode=True)
    (gradient,) = torch.autograd.grad(of(embedding), embedding)
    assert gradient.norm() > 0
    with torch.autocast("cpu", torch.bfloat16):
        half = [f.apply(lambda t: t.detach().bfloat16()) for f in (student, teacher)]
        assert loss.float()(*half, batch()).isfinite()


# --- Whose answers -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LABEL_FREE)
def test_losses_without_labels_do_not_see_which_image_is_which(make, case):
    loss, student, teacher = make(case), features(3, seed=1), features(5, seed=2)
    moved = student.apply(lambda t: t.roll(1, 0))
    value = loss(student, teacher, batch())
    torch.testing.assert_close(loss(moved, teacher, batch()), value)


@pytest.mark.parametrize("case", LABELED)
def test_labeled_losses_see_which_image_is_which(make, case):
    loss, student, teacher = make(case), features(3, seed=1), features(5, seed=2)
    moved = student.apply(lambda t: t.roll(1, 0))
    apart = loss(moved, teacher, batch()) - loss(student, teacher, batch())
    assert apart.abs() > 1e-3


@pytest.mark.parametrize("case", LABELED)
def test_permuted_answers_belong_to_other_images_of_the_batch(make, case):
    permuted, own = make(case, target="permuted"), make(case)
    student, teacher = features(3, seed=1), features(5, seed=2)
    seen, plain = [], permuted.compared

    def watched(ours, theirs, tree):
        seen.append(theirs)
        return plain(ours, theirs, tree)

    permuted.compared = watched
    for epoch in (1, 2, 1):
        permuted.on_epoch_start(epoch)
        value = permuted(student, teacher, batch())
        again = own(student, replace(teacher, embedding=seen[-1]), batch())
        torch.testing.assert_close(value, again)
        gap = torch.cdist(seen[-1], teacher.embedding)
        whose = (gap == 0).long().argmax(1)
        assert sorted(whose.tolist()) == list(range(CLOUD))
        assert (whose != torch.arange(CLOUD)).all()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("case", LABEL_FREE)
def test_other_answers_are_those_to_the_batch_before(make, case):
    other, own = make(case, target="other"), make(case)
    own.load_state_dict({k: v for k, v in other.state_dict().items() if k != "held"})
    student = features(3, seed=1)
    before = features(5, seed=2)  # what `setup` was shown
    for seed in (10, 11, 12):
        now = features(5, seed=seed)
        found = other(student, now, batch())
        torch.testing.assert_close(found, own(student, before, batch()))
        assert (found - own(student, now, batch())).abs() > 1e-6
        before = now


def test_other_answers_do_not_depend_on_the_order_of_the_batch_before(make):
    student, teacher = features(3, seed=1), features(5, seed=2)
    values, order = [], torch.randperm(CLOUD, generator=torch.Generator().manual_seed(0))
    for index in (torch.arange(CLOUD), order):
        loss = make("wasserstein", edges="random", target="other")
        loss(student, features(5, seed=3).apply(lambda t, i=index: t[i]), shown(*index))
        values.append(loss(student, teacher, batch()))
    torch.testing.assert_close(*values)


def test_other_answers_are_not_kept_in_eval_mode(make):
    loss, student, teacher = (
        make("wasserstein", target="other").eval(),
        *(features(width, seed) for width, seed in ((3, 1), (5, 9))),
    )
    value = loss(student, teacher, batch())
    assert loss(student, teacher, batch()) == value


@pytest.mark.parametrize("case", LABEL_FREE)
def test_other_answers_are_the_same_after_an_interruption(make, case):
    def run(loss, seeds):
        return [loss(features(3, seed=100 + s), features(5, seed=s), batch()).item() for s in seeds]

    whole, stopped = make(case, target="other"), make(case, target="other")
    expected = run(whole, [10, 11, 12, 13])
    first = run(stopped, [10, 11])
    saved = {key: value.clone() for key, value in stopped.state_dict().items()}
    run(stopped, [20])  # what is done after saving does not reach what was saved
    again = make(case, target="other")
    again.load_state_dict(saved)
    assert first + run(again, [12, 13]) == expected


@pytest.mark.parametrize("edges", ["persistent", "random"])
def test_clouds_of_several_processes_go_on_after_an_interruption_too(make, edges):
    large = [features(width, seed=3, n=2 * CLOUD) for width in (3, 5)]
    loss, own = (make("wasserstein", edges=edges, target=target) for target in ("other", "own"))
    # No larger cloud comes before the first one.
    assert loss(*large, batch(2 * CLOUD)) == own(*large, batch(2 * CLOUD))
    again = make("wasserstein", edges=edges, target="other")
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.held, large[1].embedding)


@pytest.mark.parametrize("case", LABEL_FREE)
def test_a_mean_target_is_the_same_for_all_answers(make, case):
    loss, student = make(case, target="mean"), features(3, seed=1)
    values = [loss(student, features(5, seed=seed), batch()).item() for seed in (2, 3)]
    assert values[0] == values[1]
    other = loss(features(3, seed=4), features(5, seed=2), batch())
    assert other.item() != values[0]


@pytest.mark.parametrize("case", LABEL_FREE)
def test_a_mean_target_is_the_mean_of_what_describes_the_clouds_of_the_teacher(make, case):
    loss = make(case, target="mean").float()
    each = [loss.described(made.embedding, None).tolist() for _, made in islice(answers(0), 64)]
    assert len(each) == 8
    mean = [sum(column) / len(each) for column in zip(*map(flat, each), strict=True)]
    assert flat(loss.held.tolist()) == pytest.approx(mean, rel=1e-5, abs=1e-7)


def flat(values):
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]


@pytest.mark.parametrize("target", ["other", "mean"])
def test_a_target_that_nobody_found_is_asked_for(target):
    loss = LOSSES["wasserstein"](target=target)
    needed = rf"target: {target} needs setup\(\) before the first batch"
    with pytest.raises(ValueError, match=needed):
        loss(features(3, seed=1), features(5, seed=2), batch())


# --- What makes no control -----------------------------------------------------------------------


@pytest.mark.parametrize("case", LABEL_FREE)
def test_permuting_is_no_control_where_labels_are_not_seen(make, case):
    with pytest.raises(ValueError, match="target: permuted changes nothing .* use other"):
        make(case, target="permuted")


@pytest.mark.parametrize("case", LABELED)
@pytest.mark.parametrize("target", ["other", "mean"])
def test_labeled_losses_are_controlled_by_permuting(make, case, target):
    with pytest.raises(ValueError, match=f"target: {target} .* use permuted"):
        make(case, target=target)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("topkd", {"dimension": 1, "edges": "random"}, "edges: random .* use dimension: 0"),
        ("wasserstein", {"dimension": 1, "edges": "random"}, "edges: random .* use dimension: 0"),
        ("wasserstein", {"dimension": 1, "target": "mean"}, "target: mean .* use other"),
        ("topkd", {"via": "ripsnet", "edges": "random"}, "edges: random .* use via: exact"),
        ("topkd", {"via": "ripsnet", "target": "permuted"}, "target: permuted .* use other"),
        ("rtd_lite", {"edges": "all"}, "edges must be persistent or random, got all"),
        ("rtd_lite", {"target": "his"}, "target must be own or permuted or other or mean, got his"),
    ],
)
def test_what_makes_no_sense_is_refused(make, case, options, message):
    with pytest.raises(ValueError, match=message):
        make(case, **options)


@pytest.mark.parametrize(
    "name", ["topkd", "wasserstein", "pce", "edge_matching", "rtd_lite", "ultrametric"]
)
def test_recipes_can_ask_for_controls(name):
    loss, asked = LOSSES[name], {"edges": "random", "target": "other"}
    takes = loss.__init__
    assert parse_options(takes, asked, "losses[0]") == asked
