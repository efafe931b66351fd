"""Write and read the checkpoint of one stage.

A stage's folder is a Hugging Face model folder: ``config.json``, ``model.safetensors``, tokenizer.
Blocks that the stage runs anything of get the slots 0, 1, ... in order; the config's key
``pdtrim`` (:class:`StageEntry`) holds the stage, the plan, its digest, each slot's dense layer, and
the SHA-256 of every file beside the config and of the config itself, which are checked before the
weights are loaded: one altered bit is refused. If all slots are whole
blocks it is a plain checkpoint that transformers loads. Otherwise its model type is
``pdtrim_<family>``, which transformers does not know: loaded as a plain model it would get random
weights for the parts that are missing, and the config has no word for a width of each layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from pdtrim.errors import ModelError, PlanError, border
from pdtrim.keep.files import sha256_of, write_json
from pdtrim.keep.tensors import write_tensors
from pdtrim.kv.bias import KVBias, Table
from pdtrim.models.block import KEYS_AND_VALUES
from pdtrim.models.configs import ATTENTION, TOKENS, config_of, generation_ids
from pdtrim.models.families import family_named, family_of
from pdtrim.models.loading import check_finite, quiet
from pdtrim.models.model import Model
from pdtrim.models.narrow import narrow
from pdtrim.models.tokenizers import load_tokenizer
from pdtrim.plan import MAX_PLAN_BYTES, Gates, LayerKV, PrunePlan, Sha256, Stage
from pdtrim.reading.json_text import read_json
from pdtrim.records import Frozen, first_problem

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PREFIX = "pdtrim_"
WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class StageEntry(Frozen):
    """What pdtrim writes into the config of a stage's checkpoint.

    Attributes:
        layers: dense layer of each slot.
        files: SHA-256 of each file beside the config, by its path below the folder.
        config_sha256: of the config with this entry, without this field and ``pair``.
        pair: the same in both stages of one export and in no others.
    """

    stage: Stage
    layers: tuple[int, ...]
    plan_digest: str
    plan: dict[str, Any]
    files: dict[str, Sha256]
    config_sha256: Sha256
    pair: Sha256 | None = None


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The config of a stage's checkpoint: the network's part, and pdtrim's."""

    data: dict[str, Any]
    plan: PrunePlan
    entry: StageEntry


def save_stage(model: Model, plan: PrunePlan, stage: Stage, folder: Path) -> None:
    """Write one stage of a plan into a new folder.

    Args:
        model: what the stage runs (``stage/swap.py``), with all of the dense model's layers.

    Raises:
        PdtrimError: the system refuses to write.
    """
    layers = plan.gates.layers(stage)
    kept = {layer: held_parts(model.config, plan.gates, plan.kv, stage, layer) for layer in layers}
    tensors = _stage_tensors(model, kept)
    folder.mkdir(parents=True)
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    special = {name: getattr(model.network.generation_config, name, None) for name in TOKENS}
    generation_ids(special, f"'{model.name}'").save_pretrained(folder)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)
    write_stage_config(model, plan, stage, folder)


def write_stage_config(model: Model, plan: PrunePlan, stage: Stage, folder: Path) -> None:
    """Write a stage's config, with the digests of the files that its folder holds by now."""
    layers = plan.gates.layers(stage)
    config = json.loads(json.dumps(_stage_config(model, plan, stage)))
    config["pdtrim"] = {
        "stage": stage,
        "layers": list(layers),
        "plan_digest": plan.digest,
        "files": {name: sha256_of(folder / name) for name in sorted(file_names(folder))},
        "plan": plan.to_json(),
    }
    config["pdtrim"]["config_sha256"] = _digest(config)
    write_json(folder / CONFIG, config)


def seal(folders: Mapping[Stage, Path]) -> None:
    """Write into both stages of one export that they belong together."""
    configs = {
        stage: read_json(folder / CONFIG, limit=2 * MAX_PLAN_BYTES)
        for stage, folder in folders.items()
    }
    pair = _digest({stage: config["pdtrim"]["files"] for stage, config in configs.items()})
    for stage, config in configs.items():
        config["pdtrim"]["pair"] = pair
        write_json(folders[stage] / CONFIG, config)


def load_stage(folder: str | Path, stage: Stage, *, device: str = "cpu") -> tuple[Model, PrunePlan]:
    """Read one stage's checkpoint and the plan inside it.

    Raises:
        ModelError: not such a folder, the other stage's, a file that is not the one that export
            wrote, or weights that do not fit the plan.
        PlanError: the plan inside is invalid, its digest wrong, or a width beyond the model's.
    """
    folder = Path(folder)
    found = read_stage(folder, stage)
    check_files(folder, found.entry)
    data, plan = dict(found.data), found.plan
    layers = plan.gates.layers(stage)
    data["model_type"] = str(data["model_type"]).removeprefix(PREFIX)
    dtype = getattr(torch, str(data.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise ModelError(f"{folder / 'config.json'}: unknown dtype {data.get('dtype')!r}")
    with quiet(), border(ModelError, f"cannot load {folder}"):
        config = config_of(data, str(folder))
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
        _narrow_slots(network, plan, stage)
        tensors = load_file(folder / WEIGHTS)
        _fill(network, tensors, _expected_missing(network, plan, stage), folder)
        check_finite(network, str(folder))
        tokenizer = load_tokenizer(folder)
    model = Model(
        network.to(device),
        tokenizer,
        name=plan.model.name,
        revision=plan.model.revision,
        layers=layers,
        num_layers=plan.model.num_layers,
    )
    return model, plan


def read_stage_config(folder: Path, stage: Stage) -> tuple[dict[str, Any], PrunePlan]:
    """The config without pdtrim's entry, and the plan of that entry; see :func:`read_stage`."""
    found = read_stage(folder, stage)
    return found.data, found.plan


def read_stage(folder: Path, stage: Stage) -> StageConfig:
    """The config of a stage's checkpoint, its own digest and the plan's checked.

    Raises:
        ModelError: not such a folder, the other stage's, from an older version, or altered.
        PlanError: the plan inside is invalid, or its digest wrong.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"no {stage} checkpoint at {folder}: make one with 'pdtrim export'")
    data = read_json(path, limit=2 * MAX_PLAN_BYTES, kind=ModelError)
    entry = data.pop("pdtrim", None) if isinstance(data, dict) else None
    if not isinstance(entry, dict) or not isinstance(data.get("model_type"), str):
        raise ModelError(f"{folder} was not exported by pdtrim: its config has no 'pdtrim' entry")
    if entry.get("stage") != stage:
        raise ModelError(f"{folder} holds stage '{entry.get('stage')}', not '{stage}'")
    plan = PrunePlan.from_json(entry.get("plan"), source=str(path))
    if entry.get("plan_digest") != plan.digest:
        raise PlanError(f"{path}: the plan does not match its digest; export it again")
    if "files" not in entry:
        raise ModelError(f"{folder} is from an older version, without digests: export it again")
    try:
        made = StageEntry.model_validate(entry)
    except ValidationError as error:
        raise ModelError(f"{path}: {first_problem(error)}; export it again") from error
    own = {key: value for key, value in entry.items() if key not in ("config_sha256", "pair")}
    if made.config_sha256 != _digest({**data, "pdtrim": own}):
        raise ModelError(f"{path} is not the file that export wrote: export it again")
    return StageConfig(data=data, plan=plan, entry=made)


def check_files(folder: Path, entry: StageEntry) -> None:
    """Compare every file beside a config with the digest that the config has of it.

    Raises:
        ModelError: a file that is missing or altered, or further weights, which an engine that
            reads all weights of a folder would take for the stage's.
    """
    present = file_names(folder)
    for name in present:
        if name not in entry.files and name.endswith(WEIGHT_ENDINGS):
            raise ModelError(f"{folder / name} was not written by export: move it away")
    for name, digest in entry.files.items():
        if name not in present:
            raise ModelError(f"{folder / name} is gone: export it again")
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            raise ModelError(f"cannot read {folder / name}: {error.strerror}") from error
        if found != digest:
            raise ModelError(
                f"{folder / name} is not the file that export wrote (its SHA-256 differs):"
                " export it again"
            )


def file_names(folder: Path) -> set[str]:
    """Paths of the files below a stage's folder, without its config."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in files} - {CONFIG}


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def read_kv_bias(folder: Path, stage: Stage, layers: Iterable[int]) -> dict[int, KVBias]:
    """The biases of keys and values that a stage's checkpoint holds, by dense layer.

    Args:
        layers: those that are asked for; one without biases is left out.
    """
    data, plan = read_stage_config(folder, stage)
    family = family_named(str(data["model_type"]).removeprefix(PREFIX))
    slots = {layer: slot for slot, layer in enumerate(plan.gates.layers(stage))}
    found = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for layer in layers if family.biases_every_key else ():
            place = f"model.layers.{slots[layer]}"
            pair = [f"{place}.{family.making(made).name}.bias" for made in KEYS_AND_VALUES]
            if set(pair) <= names:
                k_GD, v_GD = (file.get_tensor(n).view(-1, plan.model.head_dim) for n in pair)
                found[layer] = KVBias(k_GD=k_GD, v_GD=v_GD)
    return found


def stage_rope(folder: Path, stage: Stage, dtype: torch.dtype) -> Callable[[Tensor], Table]:
    """RoPE of a stage's checkpoint without its weights: positions ``[1, T]`` to cos and sin."""
    data, _ = read_stage_config(folder, stage)
    data["model_type"] = str(data["model_type"]).removeprefix(PREFIX)
    config = config_of(data, str(folder))
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    rotary = type(network.model.rotary_emb)(config)

    def rope(positions_1T: Tensor) -> Table:
        rotary.to(positions_1T.device)
        like = torch.empty(0, dtype=dtype, device=positions_1T.device)
        cos, sin = rotary(like, positions_1T)
        return cos, sin

    return rope


def held_parts(
    config: PreTrainedConfig, gates: Gates, rules: Sequence[LayerKV], stage: Stage, layer: int
) -> tuple[str, ...]:
    """Names of the submodules that a stage's checkpoint holds of a layer.

    Args:
        rules: of all layers; a selector may need more of a layer than its gates do.
    """
    attention, mlp = gates.of(stage)
    sends = stage == "prefill" and gates.decode_attention[layer]
    return family_of(config).parts(
        attention=attention[layer],
        mlp=mlp[layer],
        selector=rules[layer].selector if sends else None,
    )


def _stage_tensors(model: Model, kept: dict[int, tuple[str, ...]]) -> dict[str, torch.Tensor]:
    tensors = {}
    slots = {layer: slot for slot, layer in enumerate(kept)}
    for name, tensor in model.network.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            layer_text, _, part = name.removeprefix("model.layers.").partition(".")
            layer = int(layer_text)
            if layer not in kept or not part.startswith(tuple(f"{p}." for p in kept[layer])):
                continue
            name = f"model.layers.{slots[layer]}.{part}"
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _stage_config(model: Model, plan: PrunePlan, stage: Stage) -> dict[str, Any]:
    layers = plan.gates.layers(stage)
    attention, mlp = plan.gates.of(stage)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config["num_hidden_layers"] = len(layers)
    if config.get("layer_types") is not None:
        config["layer_types"] = [config["layer_types"][layer] for layer in layers]
    if config.get("max_window_layers") is not None:
        config["max_window_layers"] = min(config["max_window_layers"], len(layers))
    config["architectures"] = [type(model.network).__name__]
    config["dtype"] = model.dtype_name
    if any(
        attention[i] not in ("full", True) or not mlp[i] or plan.width(stage, i) for i in layers
    ):
        config["model_type"] = PREFIX + config["model_type"]
        config["architectures"] = ["PDTrim" + config["architectures"][0]]
    return config


def _narrow_slots(network: Any, plan: PrunePlan, stage: Stage) -> None:
    """Make each slot as narrow as its layer, so that the checkpoint's tensors fit."""
    family = family_of(network.config)
    for slot, layer in enumerate(plan.gates.layers(stage)):
        width = plan.width(stage, layer)
        if width is not None:
            narrow(family(network.model.layers[slot]), width, layer=layer)


def _expected_missing(network: PreTrainedModel, plan: PrunePlan, stage: Stage) -> set[str]:
    """Parameters that the stage's checkpoint leaves out."""
    missing = {"lm_head.weight"} if network.config.tie_word_embeddings else set()
    for slot, layer in enumerate(plan.gates.layers(stage)):
        held = held_parts(network.config, plan.gates, plan.kv, stage, layer)
        parts = tuple(f"{p}." for p in held)
        for name, _ in network.model.layers[slot].named_parameters():
            if not name.startswith(parts):
                missing.add(f"model.layers.{slot}.{name}")
    return missing


def _fill(
    network: PreTrainedModel, tensors: dict[str, torch.Tensor], missing: set[str], folder: Path
) -> None:
    wanted = {name: p for name, p in network.named_parameters() if name not in missing}
    wrong = sorted(set(wanted) ^ set(tensors)) or sorted(
        name for name, p in wanted.items() if p.shape != tensors[name].shape
    )
    if wrong:
        raise ModelError(f"{folder / WEIGHTS} does not fit its plan: see '{wrong[0]}'")
    network.load_state_dict(tensors, assign=True, strict=False)
    network.tie_weights()
    # computed, not stored: made on the meta device, so made again
    network.model.rotary_emb = type(network.model.rotary_emb)(network.config)
    for module in list(network.model.layers.modules()):
        for name, child in list(module.named_children()):
            if any(p.is_meta for p in child.parameters(recurse=False)):
                setattr(module, name, None)  # a part that this stage never runs
