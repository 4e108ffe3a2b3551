"""The training loop, independent of losses and networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import topkd
from topkd._io import files
from topkd._io import state as states
from topkd._io.progress import Progress
from topkd._runtime import processes
from topkd._runtime.sync_batchnorm import synchronize
from topkd.config.recipe import Recipe
from topkd.data import Data, training_batches
from topkd.evaluation import metrics
from topkd.evaluation.results import GradientPlace
from topkd.features import Batch, FeatureExtractor, Features, Teacher
from topkd.losses.base import LossTerm, located
from topkd.training import objective, optim
from topkd.training.backward import carry_back, pull_back, share_among_processes
from topkd.training.objective import GradientBalancer, measured_at
from topkd.training.precision import Runtime, compiled
from topkd.training.teacher_cache import TeacherCache
from topkd.training.tracking import Sums, Trackers, summary

OnEpoch = Callable[[Mapping[str, Any]], None]


def ignore_epoch(entry: Mapping[str, Any]) -> None:
    """Does nothing with the metrics of an epoch."""


class Diverged(ValueError):
    """Raised when a loss term becomes NaN or infinite; the message names the term."""


class Trainer:
    """Trains one student.

    Args:
        student: The student.
        teacher: The teacher; None if no loss needs one.
        losses: Terms of the objective.
        data: Training and evaluation data.
        recipe: The recipe, with number of epochs, batch size and optimizer.
        seed: Seed of the order of the images and of their augmentation.
        device: Device, autocast dtype and compilation settings.
        progress: Shows progress and messages.
        teacher_cache: Cache of the teacher's features, if enabled.
        identity: Name -> other dependency of the result, e.g. a hash of the teacher's weights. A
            run is not resumed if one of them has changed.
        trackers: Names of experiment trackers, see :class:`~topkd.training.tracking.Trackers`.
        on_epoch: Called with the metrics of every epoch once its state is saved; when a run
            resumes, first with those of the earlier epochs. An exception stops the run.
    """

    def __init__(
        self,
        student: FeatureExtractor,
        teacher: Teacher | None,
        losses: Sequence[LossTerm],
        data: Data,
        recipe: Recipe,
        seed: int,
        device: Runtime,
        progress: Progress,
        teacher_cache: TeacherCache | None = None,
        identity: Mapping[str, str] = MappingProxyType({}),
        trackers: Sequence[str] = ("auto",),
        on_epoch: OnEpoch = ignore_epoch,
    ) -> None:
        self.trackers, self.on_epoch = trackers, on_epoch
        self.teacher_cache = teacher_cache
        self.identity = dict(identity)
        self.accelerator = processes.accelerator()
        self.student = student.to(device.device)
        if recipe.sync_batchnorm:
            synchronize(self.student)
        self.teacher = None if teacher is None else teacher.to(device.device)
        self.losses = [LossTerm(w.settings, w.loss.to(device.device)) for w in losses]
        self.adapters = nn.ModuleList(w.loss for w in self.losses)
        self.reads_maps = any(w.loss.reads_maps for w in self.losses)
        self.data, self.recipe, self.seed = data, recipe, seed
        self.device, self.progress = device, progress
        self.weights = [
            p for p in (*student.parameters(), *self.adapters.parameters()) if p.requires_grad
        ]
        self.optimizer = optim.build(recipe.optimizer, self.weights)
        self.steps = len(data.train.target) // (recipe.batch_size * self.accelerator.num_processes)
        self.history: list[dict[str, Any]] = []
        self.balance = GradientBalancer()
        self.parallel = self.accelerator.prepare(student)  # for several processes
        self.run_student: Callable[[Tensor], Features] = compiled(self.parallel, device, progress)
        reads_teacher = any(w.loss.needs_teacher for w in self.losses)
        self.run_teacher = (
            compiled(teacher, device, progress) if teacher and reads_teacher else None
        )
        self.predictions: metrics.Predictions | None = None
        """Predictions for the evaluation images after the last epoch."""

    def run(self, folder: Path) -> list[dict[str, Any]]:
        """Trains to the last epoch, resuming from the state in the folder.

        Args:
            folder: Folder of the state and of ``metrics.jsonl``.

        Returns:
            Metrics, one entry per epoch.

        Raises:
            Diverged: If a loss or a feature becomes NaN or infinite.
            FileNotFoundError: If the folder is deleted during training.
            ValueError: If the state in the folder is damaged or belongs to another number of
                processes.
        """
        state = processes.by_first(lambda: states.load(folder / "checkpoint"))
        self._resume(state, folder / "checkpoint")
        if self.history and self.accelerator.is_main_process:
            # The process may have been killed between writing the state and the metrics.
            files.write(folder / "metrics.jsonl", files.json_lines(self.history))
        reported = self._report_issues([])
        if self.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
        trackers = Trackers(self.trackers if self.accelerator.is_main_process else (), folder)
        left = range(len(self.history) + 1, self.recipe.epochs + 1)
        title = f"{folder.parent.name} seed {self.seed}"
        images = self.recipe.epochs * self.steps * self.recipe.batch_size
        with self.progress.bar(title, images, "images") as advance:
            advance(len(self.history) * self.steps * self.recipe.batch_size, "")
            for entry in self.history:
                self.on_epoch(entry)
            for epoch in left:
                entry = self._epoch(epoch, advance)
                self.history.append(entry)
                # Buffers such as memory banks differ between processes.
                buffers = processes.of_all(dict(self.adapters.named_buffers()))
                if self.accelerator.is_main_process:
                    self._save(folder, buffers[1:])
                trackers.log(entry)
                reported = self._report_issues(reported)
                advance(0, f"epoch {epoch}/{self.recipe.epochs}, {summary(entry)}")
                self.on_epoch(entry)
        trackers.finish()
        return self.history

    def _report_issues(self, reported: list[str]) -> list[str]:
        """Prints a warning about unusable samples if there are new ones."""
        lines = self.data.faults.lines()
        for line in lines if lines != reported else []:
            self.progress.say(f"warning: {line}")
        return lines

    def _epoch(self, epoch: int, advance: Callable[[int, str], None]) -> dict[str, Any]:
        start, sums = time.perf_counter(), Sums()
        torch.manual_seed(self.seed * 1_000_003 + epoch)  # for random layers such as dropout
        self.student.train()
        for weighted in self.losses:
            weighted.on_epoch_start(epoch)
        often = self._measurements(epoch)
        measured = {round(i * self.steps / often) for i in range(often)}
        batches = training_batches(
            self.data.train,
            self.recipe.batch_size,
            self.seed,
            epoch,
            augmentation_seed=self.recipe.data.augmentation_seed,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        for step, batch in enumerate(batches):
            done = epoch - 1 + step / self.steps
            rate = optim.learning_rate(self.recipe.optimizer, done, self.recipe.epochs)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.step(batch, epoch, sums, measure=step in measured)
            advance(self.recipe.batch_size, "")
        for name, total in sums.totals.items():
            sums.totals[name] = self.accelerator.reduce(total, "mean")  # mean over processes
        seconds = time.perf_counter() - start
        # Running statistics differ between processes; those of rank 0 are kept.
        processes.copy_from_first(list(self.student.buffers()))
        processes.merge(self.data.faults.unreadable)
        return {
            "epoch": epoch,
            "learning_rate": rate,
            "train_top1": 100 * sums.means("right")[""],
            **self._evaluation(epoch),
            "losses": sums.means("loss/"),
            "weights": sums.means("weight/"),
            "gradient_share": sums.means("share/"),
            "gradient_cosine": sums.means("cosine/"),
            "gradient_at": self._place(epoch),
            "warnings": self._warnings(epoch, sums),
            "seconds": round(seconds, 3),
        }

    def _evaluation(self, epoch: int) -> dict[str, float]:
        """Evaluates the student if the recipe schedules it; after the last epoch in float32."""
        is_last = epoch == self.recipe.epochs
        if epoch % self.recipe.evaluate_every and not is_last:
            return {}
        self.student.eval()
        with nullcontext() if is_last else self.device.autocast():
            predictions = metrics.predict(self.student, self.data.test, self.device.device)
        if is_last:
            self.predictions = predictions
        return {f"{self.data.eval_split}_top1": metrics.top_k(predictions, 1)}

    def step(self, batch: Batch, epoch: int, sums: Sums, *, measure: bool) -> None:
        device = self.device.device
        batch = batch.apply(lambda t: t.to(device, non_blocking=True))
        # Measuring at the weights retains the graph, parts of which compiled networks overwrite.
        is_eager = measure and self._place(epoch) == "backbone weights"
        student_output, teacher_output = self._outputs(batch, epoch, is_eager=is_eager)
        # Detached copies, so that the gradient of each term can be measured at the features.
        features = student_output.apply(lambda t: t.detach().float().requires_grad_())
        teacher_output = teacher_output.apply(lambda t: t.detach().float())
        values = self._values(features, teacher_output, batch, epoch)
        if measure:
            self._measure(values, features, student_output, epoch, sums)
        weights = self._weights(epoch)
        total = torch.stack([weights[title] * value for title, value in values.items()]).sum()
        self.optimizer.zero_grad()
        direct = pull_back(total, features, self.student, self.adapters)
        if features.distilled is not None and features.distilled.grad is None:
            raise ValueError(
                "the student has a distillation head, which contributes to predictions, but no "
                "term trains it; add the loss deit, or use a network without this head"
            )
        carry_back(student_output, features)
        share_among_processes(self.adapters, direct, self.accelerator.reduce)
        if self.recipe.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self.recipe.gradient_clip)
        self.optimizer.step()
        for title, value in values.items():
            sums.add(f"loss/{title}", value)
            sums.add(f"weight/{title}", torch.tensor(weights[title]))
        sums.add("right", (features.logits.argmax(1) == batch.target).float().mean())

    def _outputs(self, batch: Batch, epoch: int, *, is_eager: bool) -> tuple[Features, Features]:
        """Runs both networks; the student uncompiled if ``is_eager``."""
        run_student = self.parallel if is_eager else self.run_student
        with self.device.autocast():
            student_output = run_student(batch.images)
            # If no loss reads the teacher, the student's features are a placeholder.
            teacher_output = (
                student_output if self.run_teacher is None else self._teacher_features(batch, epoch)
            )
        if self.reads_maps:
            return student_output, teacher_output
        outputs = (student_output, teacher_output)  # avoids copies of large tensors
        student_output, teacher_output = (
            replace(output, maps=[], preactivations=[]) for output in outputs
        )
        return student_output, teacher_output

    def _teacher_features(self, batch: Batch, epoch: int) -> Features:
        assert self.run_teacher is not None
        if self.teacher_cache is None:
            return self.run_teacher(batch.images)
        return self.teacher_cache(batch, epoch, self.run_teacher)

    def _values(
        self, features: Features, teacher_output: Features, batch: Batch, epoch: int
    ) -> dict[str, Tensor]:
        """Computes the unweighted value of every active term."""
        values, local = {}, (features, teacher_output, batch)
        gathered = local
        if processes.count() > 1 and any(w.settings.batch == "gathered" for w in self.losses):
            soft = None if batch.soft is None else processes.gather(batch.soft)
            # Images are not gathered: no loss reads them.
            labels = Batch(
                batch.images, processes.gather(batch.target), processes.gather(batch.index), soft
            )
            gathered = (
                features.apply(processes.gather),
                teacher_output.apply(processes.gather),
                labels,
            )
        for weighted in self.losses:
            title = weighted.title
            if not weighted.is_active(epoch, self.recipe.epochs):
                continue
            try:
                value = weighted.value(
                    *(gathered if weighted.settings.batch == "gathered" else local)
                )
            except ValueError as error:
                raise Diverged(f"epoch {epoch}, {error}") from error
            if not value.isfinite():
                raise Diverged(
                    f"epoch {epoch}, {located(title)}: the loss is {value.item()}; "
                    "try a smaller optimizer.lr, or gradient_clip=1"
                )
            values[title] = value
        return values

    def _weights(self, epoch: int) -> dict[str, float]:
        terms = [weighted.settings for weighted in self.losses]
        return self.balance.weights(terms, epoch, self.recipe.epochs)

    def _place(self, epoch: int) -> GradientPlace:
        return measured_at(self.losses, epoch, self.recipe.epochs)

    def _measurements(self, epoch: int) -> int:
        is_shared = any(weighted.settings.share for weighted in self.losses)
        return objective.measurements(self._place(epoch), self.steps, is_shared=is_shared)

    def _measure(
        self,
        values: Mapping[str, Tensor],
        features: Features,
        output: Features,
        epoch: int,
        sums: Sums,
    ) -> None:
        """Measures the share of each term in the gradient."""
        place, times = self._place(epoch), 1.0
        if place == "embedding":
            found = objective.gradients(values, features, self.student)
        else:
            found = objective.weight_gradients(values, features, output, self.student)
            times = min(objective.BALANCED, self.steps) / self._measurements(epoch)
        if not found:
            self.balance.update({}, place)
            return
        norms = self.accelerator.reduce(torch.stack([g.norm() for g in found.values()]), "mean")
        measured = dict(zip(found, norms.tolist(), strict=True))
        self.balance.update(measured, place, times=times)
        weights = self._weights(epoch)
        weighed = norms * norms.new_tensor([weights[title] for title in found])
        for title, share in zip(found, weighed / weighed.sum().clamp(min=1e-30), strict=True):
            sums.add(f"share/{title}", share)
        for pair, cosine in objective.cosines(found).items():
            sums.add(f"cosine/{pair}", cosine)

    def _warnings(self, epoch: int, sums: Sums) -> list[str]:
        """Returns warnings about ineffective terms, and prints each one once per term."""
        known = {line.split()[0] for entry in self.history for line in entry["warnings"]}
        means = sums.means("share/"), sums.means("cosine/")
        lines = objective.warnings(*means, self._place(epoch))
        for line in lines:
            if line.split()[0] not in known:
                self.progress.say(f"warning: epoch {epoch}: {line}")
        return lines

    def _save(self, folder: Path, others: Sequence[Mapping[str, Tensor]]) -> None:
        state = {
            "student": self.student.network.state_dict(),
            "losses": self.adapters.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "norms": self.balance.norms,
            "norms_at": self.balance.at,
            "processes": processes.count(),
            "buffers_of_others": list(others),
            "identity": self.identity,
            "topkd": topkd.__version__,
        }
        files.refuse_deleted(folder)
        states.save(folder / "checkpoint", state)
        files.write(folder / "metrics.jsonl", files.json_lines(self.history))

    def _resume(self, state: Mapping[str, Any] | None, folder: Path) -> None:
        if state is None:
            return
        if state["processes"] != processes.count():
            raise ValueError(
                f"{folder} was trained with {state['processes']} processes, now there are "
                f"{processes.count()}; use the same number, or delete it to start again"
            )
        for name, now in self.identity.items():
            there = state["identity"].get(name)
            if there != now:
                raise ValueError(
                    f"{folder} was trained with another {name}: {there} there and {now} here; "
                    "restore the first, or delete the folder to start again"
                )
        if state["topkd"] != topkd.__version__:
            self.progress.say(
                f"warning: {folder} was trained by topkd {state['topkd']}, this is "
                f"{topkd.__version__}; results may differ from both versions"
            )
        self.student.network.load_state_dict(state["student"])
        self.adapters.load_state_dict(state["losses"])
        buffers = state["buffers_of_others"][processes.rank() - 1] if processes.rank() > 0 else {}
        self.adapters.load_state_dict(buffers, strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = list(state["history"])
        self.balance = GradientBalancer(dict(state["norms"]), state.get("norms_at", "embedding"))
