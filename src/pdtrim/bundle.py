"""A plan with its weights: made by a method, opened from disk, saved, turned into a pair, exported.

A plan alone is data without tensors. Blocks that a stage runs with weights of their own (repairs,
training, biases of narrower blocks) belong to it: in memory after a method has made the plan, in
files beside a plan file, or inside the two checkpoints of an exported pair. :class:`TrimPlan` holds
both, wherever the weights are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pdtrim.errors import PlanError
from pdtrim.exported import check_base, load_pair, plan_of, write_pair
from pdtrim.models.block_files import (
    BlockFiles,
    FilesInFolder,
    FilesInMemory,
    encode_blocks,
    load_blocks,
    replacing,
    save_blocks,
)
from pdtrim.models.model import Model
from pdtrim.models.swap import Blocks
from pdtrim.plan import Gates, LayerKV, Provenance, PrunePlan, Stage
from pdtrim.stage.forward import Pair
from pdtrim.stage.swap import narrowed, swap_pair
from pdtrim.versions import versions


@dataclass(frozen=True, kw_only=True)
class TrimPlan:
    """A plan and where the weights are that its stages do not share with the dense model.

    Attributes:
        files: the plan's replaced blocks, in memory or in the plan file's folder.
        exported: the pair's folder, for a plan that was opened from one.
    """

    plan: PrunePlan
    files: BlockFiles = FilesInMemory()  # noqa: RUF009 - frozen
    exported: Path | None = None

    @classmethod
    def of(
        cls,
        plan: PrunePlan,
        blocks: Blocks,
        *,
        merged: Mapping[tuple[Stage, int], tuple[int, ...]] | None = None,
    ) -> TrimPlan:
        """A plan in memory whose stages run ``blocks`` with weights of their own.

        Args:
            plan: its replacements, if it has any, are left out.
            merged: the layers that a block stands for; itself alone where it is not named.
        """
        entries, files = encode_blocks(blocks, merged or {})
        data = {**plan.to_json(), "replacements": [entry.model_dump() for entry in entries]}
        made = PrunePlan.from_json(data, source=f"method '{plan.provenance.method}'")
        return cls(plan=made, files=FilesInMemory(files=files))

    @classmethod
    def dense(cls, model: Model) -> TrimPlan:
        """The plan that prunes nothing: both stages whole, all KV sent."""
        origin = Provenance(
            method="dense",
            mode="projected",
            seed=0,
            calibration="none",
            calibration_hash="",
            search_block_tokens=0,
            versions=versions(),
        )
        plan = PrunePlan(
            model=model.ref,
            gates=Gates.dense(model.num_layers),
            kv=(LayerKV(),) * model.num_layers,
            provenance=origin,
        )
        return cls(plan=plan)

    @classmethod
    def open(cls, path: str | Path) -> TrimPlan:
        """A plan file, or the folder of an exported pair.

        Raises:
            PlanError: no such plan or pair, or one that is invalid.
            ModelError: a folder that holds no exported pair.
        """
        path = Path(path)
        if path.is_dir():
            return cls(plan=plan_of(path), exported=path)
        return cls(plan=PrunePlan.load(path), files=FilesInFolder(folder=path.parent))

    @property
    def name(self) -> str:
        """What made it, which is what results call it."""
        return self.plan.provenance.method

    def blocks(self, model: Model) -> Blocks:
        """Replaced blocks by stage and dense layer index, checked against plan and model.

        Raises:
            PlanError: a file that is missing, altered or no block of this model, or an exported
                pair, whose checkpoints hold all weights in one.
        """
        if self.exported is not None and self.plan.replacements:
            raise PlanError(f"{self.exported} is an exported pair: give the plan that it is from")
        return load_blocks(self.plan, model, self.files)

    def pair(self, model: Model) -> Pair:
        """What both stages run, on the model's device.

        Without weights of their own, stages of equal widths share one model.

        Args:
            model: the plan's dense model.

        Raises:
            PlanError: another model, or as :meth:`blocks`; a width names a head or a neuron that
                the model does not have.
        """
        check_base(model, self.plan)
        if self.exported is not None:
            return load_pair(self.exported, device=str(model.device))[0]
        return swap_pair(narrowed(self.plan, model), self.blocks(model))

    def save(self, path: str | Path) -> TrimPlan:
        """Write the plan file, with the replaced blocks in a folder beside it.

        What was there stays as it is until the new plan is whole.

        Returns:
            The same plan, its weights in these files.

        Raises:
            PlanError: an exported pair, which has no files of single blocks.
        """
        path = Path(path)
        if self.exported is not None:
            raise PlanError(f"{self.exported} is an exported pair: copy the folder instead")
        name = f"{path.stem}.blocks"
        with replacing(path, name):
            plan = save_blocks(self.plan, self.files, path.parent, name)
            plan.save(path)
        return TrimPlan(plan=plan, files=FilesInFolder(folder=path.parent))

    def export(self, model: Model, folder: str | Path) -> Path:
        """Write both checkpoints below ``folder`` and return it.

        A folder that holds something else is left alone.

        Raises:
            PlanError: as :meth:`pair`, an exported pair, or a folder that is in use.
        """
        if self.exported is not None:
            raise PlanError(f"{self.exported} is an exported pair: copy the folder instead")
        return write_pair(self.pair(model), self.plan, Path(folder))
