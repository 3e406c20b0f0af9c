"""From a run's configuration to what will be trained: every file read, every relation checked, before any group."""

import json
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ep_engine.c2r.constrain import routed
from ep_engine.checkpoint import newest, read_manifest, tokenizer_folder
from ep_engine.config import RunConfig, differing
from ep_engine.data.batches import check_rows, heldout_batches
from ep_engine.data.blend import Blend, domain_weights, reference_losses
from ep_engine.data.tokens import TokenFile
from ep_engine.data.vocabulary import check_ids, check_range, check_token_file, check_tokenizer, read_vocabulary
from ep_engine.errors import UserError
from ep_engine.layout import check_ranks, check_split, make_stages
from ep_engine.model_config import ModelConfig, first_sentence, in_words, read_model_config
from ep_engine.ops import MAX_SHARERS, MAX_TOP_K
from ep_engine.output import check_output_folder
from ep_engine.placement import Placement, read_placement
from ep_engine.run_folder import check_unused
from ep_engine.stages import Stages
from ep_engine.training.trained import check_trained

ONE = "all"  # domain of a run without domains
_INPUTS = (
    ("model", "checkpoint"),
    ("data", "train"),
    ("data", "heldout"),
    ("data", "tokenizer"),
    ("moe", "placement"),
    ("routing", "profile"),
)


@dataclass(frozen=True)
class Run:
    """A run that can start."""

    config: RunConfig
    model: ModelConfig
    stages: Stages  # of the pipeline
    placement: Placement | None  # of a MoE model
    checkpoint: Path | None  # whose weights to load; None: new weights
    resume: Path | None  # checkpoint with moments and a step to go on from
    train: dict[str, TokenFile]  # of every domain; of one file without domains under the name of `ONE`
    heldout: dict[str, TokenFile]  # as well; may be empty

    def settings(self) -> dict[str, Any]:
        """What all ranks must have in common, by the names that a user knows."""
        keys = {
            f"{section}.{name}": value
            for section, values in self.config.model_dump(mode="json").items()
            for name, value in values.items()
        }
        layers = self.placement.layers if self.placement else None
        return keys | {
            "the checkpoint to go on from": str(self.checkpoint),
            "the model (crc32)": zlib.crc32(self.model.model_dump_json().encode()),
            "the placement (crc32)": zlib.crc32(repr(layers).encode()),
            **{f"the number of tokens in data.train of {name}": file.num_tokens for name, file in self.train.items()},
        }

    def blend(self) -> Blend:
        """The rows of the run from where it goes on.

        Raises:
            UserError: the checkpoint to go on from had other data, or weights are none.
        """
        data = self.config.data
        blend = Blend(
            self.train,
            sequence_length=data.sequence_length,
            packing=data.packing,
            weights=domain_weights(data.weights, tuple(self.train)),
            seed=self.config.train.seed,
        )
        if self.resume is not None:
            kept = read_manifest(self.resume)["training"]
            if "data" in kept:
                blend.restore(kept["data"], weights=data.dynamic_weights is not None)
            else:  # of an engine that read one file from the start
                blend.advance(kept["step"] * data.batch_size)
        return blend


@dataclass(frozen=True)
class Layout:
    """A model, and how ranks share it."""

    model: ModelConfig
    stages: Stages
    placement: Placement | None


def resolve(
    config: RunConfig,
    world_size: int,
    *,
    ranks_per_node: int | None = None,
    overwrite: bool = False,
    restarted: bool = False,
) -> Run:
    """Read and check everything a run needs; touches no output.

    Args:
        config: what the user asked for.
        world_size: ranks of the job.
        ranks_per_node: of the job; None: all on one node.
        overwrite: a run folder that is not empty may be replaced.
        restarted: the folder is this job's own: go on from its last checkpoint, or begin again if it holds none yet.

    Raises:
        UserError: the ranks, the experts, the placement, the lists, the data or the run folder do not fit.
    """
    check_unused(config.output.folder)
    if config.output.wandb is not None and find_spec("wandb") is None:
        raise UserError(
            f"output.wandb is {config.output.wandb}, but the package wandb is not installed; install it, or leave the "
            "key out"
        )
    resume = _last_checkpoint(config) if config.output.resume and not restarted else None
    if restarted:  # even if all steps are done: what comes after them may not be
        resume = newest(config.output.folder)
    if resume is None:
        check_output_folder(config.output.folder, overwrite=overwrite or restarted)
        _check_apart(config)
    checkpoint = resume or config.model.checkpoint
    layout = resolve_layout(config, world_size, checkpoint, ranks_per_node=ranks_per_node)
    model = layout.model
    train, heldout = (_token_files(paths, model) for paths in (config.data.train, config.data.heldout))
    run = Run(config, model, layout.stages, layout.placement, checkpoint, resume, train, heldout)
    _check_data(run)
    return run


def resolve_layout(
    config: RunConfig, world_size: int, checkpoint: Path | None, *, ranks_per_node: int | None = None
) -> Layout:
    """Read and check what says where everything of a run lies; of the checkpoint only model.json is read.

    Raises:
        UserError: as `resolve`, but for the data and the run folder.
    """
    check_ranks(config, world_size)
    model = read_model_config(checkpoint / "model.json") if checkpoint else _new_model(config)
    model.check_predicts(f"model.checkpoint {checkpoint}")
    check_split(config, model)
    check_trained(model, config.train.trainable, config.train.freeze)
    stages = make_stages(config, model)
    placement = _placement(config, model)
    if placement is not None:
        _check_transport(config, placement, ranks_per_node or world_size)
    if config.data.sequence_length > model.max_position_embeddings:
        raise UserError(
            f"data.sequence_length ({config.data.sequence_length}) is longer than the model's positions "
            f"({model.max_position_embeddings}); choose a shorter one"
        )
    return Layout(_balanced(config, routed(config, model, placement)), stages, placement)


def _balanced(config: RunConfig, model: ModelConfig) -> ModelConfig:
    """The model with a selection bias, if the run moves one and it has none yet."""
    asked, moe = config.balance, model.moe
    if moe is None or model.is_dense:
        return model
    if asked.noise and not moe.gate_noise:
        raise UserError(
            "balance.noise is set, but the model's gates have no noise matrix (moe.gate_noise false); leave it out"
        )
    if asked.load and moe.routing.rule in ("group_limited", "c2r_grouped"):
        raise UserError(
            f"balance.load ({asked.load}) is not known under routing.rule {moe.routing.rule}, where noise moves what "
            "is open, too; use importance or switch"
        )
    if asked.load and not asked.noise:
        raise UserError(
            f"balance.load ({asked.load}) has no gradient without balance.noise, for choices are counted then; set "
            "that too, or leave it out"
        )
    if not asked.bias_rate or moe.selection_bias:
        return model
    return model.model_copy(update={"moe": moe.model_copy(update={"selection_bias": True})})


def _check_apart(config: RunConfig) -> None:
    """The run folder is emptied before the first step: nothing that is read may lie in it."""
    folder = config.output.folder.resolve()
    for section, name in _INPUTS:
        given = getattr(getattr(config, section), name)
        for path in given.values() if isinstance(given, dict) else [] if given is None else [given]:
            if folder in (path.resolve(), *path.resolve().parents):
                raise UserError(
                    f"output.folder {config.output.folder} would replace {section}.{name} {path}; choose another folder"
                )


def _last_checkpoint(config: RunConfig) -> Path:
    checkpoint = newest(config.output.folder)
    if checkpoint is None:
        raise UserError(f"output.resume is set, but {config.output.folder}/checkpoints holds none; start without it")
    step = read_manifest(checkpoint)["training"].get("step")
    if step is None:
        raise UserError(
            f"{checkpoint} knows no step to go on from, and train.steps is {config.train.steps}; name it as "
            "model.checkpoint instead"
        )
    if step >= config.train.steps:
        raise UserError(
            f"{checkpoint} is at step {step} and train.steps is {config.train.steps}; there is nothing left to do"
        )
    return checkpoint


def _new_model(config: RunConfig) -> ModelConfig:
    sizes = config.model.model_dump(exclude={"checkpoint"}, exclude_none=True)
    heads, hidden = sizes["num_heads"], sizes["hidden_size"]
    if hidden % heads or (hidden // heads) % 2:
        raise UserError(
            f"model.hidden_size ({hidden}) must be a multiple of 2 * model.num_heads ({heads}): rotary positions turn "
            "pairs of channels"
        )
    try:
        return ModelConfig(
            **{"num_kv_heads": heads, **sizes}, head_dim=hidden // heads, carried=_token_ids(config.data.tokenizer)
        )
    except ValidationError as error:
        raise UserError(first_sentence(error)) from None


def _token_ids(tokenizer: Path | None) -> dict[str, int | None]:
    """Ids of the tokenizer's bos, eos and pad token for a new model's config.json; None for one that it has not.

    Without them transformers would take LLaMA's own, 1 and 2, and never stop generating.
    """
    folder = tokenizer_folder(tokenizer)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return {}
    try:
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        config = folder / "tokenizer_config.json"
        names = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"tokenizer folder {folder} cannot be read ({error}); write it again") from None
    id_of = {token["content"]: token["id"] for token in added}
    tokens = {kind: names.get(f"{kind}_token") for kind in ("bos", "eos", "pad")}
    contents = {kind: token["content"] if isinstance(token, dict) else token for kind, token in tokens.items()}
    return {f"{kind}_token_id": id_of.get(content) for kind, content in contents.items()}


def _placement(config: RunConfig, model: ModelConfig) -> Placement | None:
    ep_size, etp = config.parallel.expert_parallel_size, config.parallel.expert_tensor_parallel_size
    if model.moe is None or model.is_dense:
        asked = [name for name in ("moe", "routing", "balance") if differing(getattr(config, name))]
        if ep_size * etp > 1 or asked:
            key, size = ("expert_parallel_size", ep_size) if ep_size > 1 else ("expert_tensor_parallel_size", etp)
            what = f"[{asked[0]}]" if asked else f"parallel.{key} ({size})"
            raise UserError(f"{what} needs a model with experts, this one is dense; split it first")
        return None
    experts_of_layer = model.experts_of_layer()
    fewest = min(experts_of_layer)
    if model.moe.top_k * etp > MAX_TOP_K:
        times = f" times parallel.expert_tensor_parallel_size ({etp})" if etp > 1 else ""
        raise UserError(
            f"moe.top_k of the model ({model.moe.top_k}){times} must be at most {MAX_TOP_K}; choose fewer experts"
            f"{' or parts' if etp > 1 else ''}"
        )
    if model.moe.expert_hidden_size % etp:
        raise UserError(
            f"parallel.expert_tensor_parallel_size ({etp}) must divide the hidden size of the model's experts "
            f"({model.moe.expert_hidden_size}); choose a smaller one"
        )
    if ep_size > fewest:
        raise UserError(
            f"parallel.expert_parallel_size ({ep_size}) is larger than the model's number of experts ({fewest}): "
            "every rank must hold one; use fewer ranks"
        )
    if config.moe.placement is None:
        return Placement.in_order(experts_of_layer, ep_size)
    placement = read_placement(config.moe.placement)
    if placement.experts_of_layer != experts_of_layer:
        raise UserError(
            f"moe.placement {config.moe.placement} has {in_words(placement.experts_of_layer)}, the model "
            f"{in_words(experts_of_layer)}; place a profile of this model"
        )
    placement.cut(ep_size)
    return placement


def _check_transport(config: RunConfig, placement: Placement, ranks_per_node: int) -> None:
    name, ep, etp = (
        config.moe.transport,
        config.parallel.expert_parallel_size,
        config.parallel.expert_tensor_parallel_size,
    )
    ranks = ep * etp  # among which the experts of a token lie
    size = f"parallel.expert_parallel_size ({ep})"
    if etp > 1:
        size += f" times parallel.expert_tensor_parallel_size ({etp})"
    if name == "hierarchical" and config.moe.fixed_rows is not None:
        raise UserError(
            f"moe.transport is hierarchical and moe.fixed_rows is {config.moe.fixed_rows}, but what a node passes on "
            "is not fixed; leave one of them out"
        )
    wrong_device = {"shared_memory": "cuda", "cuda_ipc": "cpu"}.get(name)
    if config.parallel.device == wrong_device or (name == "cuda_ipc" and config.parallel.device == "auto"):
        raise UserError(
            f"moe.transport is {name}, which is not for parallel.device {config.parallel.device}; use collective, or "
            f"set the device to {'cuda' if name == 'cuda_ipc' else 'cpu'}"
        )
    one_machine = name in ("shared_memory", "cuda_ipc")
    if one_machine and ranks_per_node % ranks:
        raise UserError(
            f"moe.transport is {name}, but the {ranks} ranks of an expert-parallel group do not lie on one node of "
            f"{ranks_per_node} ranks; use hierarchical or collective"
        )
    if one_machine and ranks > MAX_SHARERS:
        raise UserError(
            f"moe.transport is {name}, which joins at most {MAX_SHARERS} ranks, but {size} is more; use collective"
        )
    if name == "hierarchical" and (ranks <= ranks_per_node or ranks % ranks_per_node):
        raise UserError(
            f"moe.transport is hierarchical, but {size} is no multiple of the {ranks_per_node} ranks of a node that is "
            "larger; use collective or shared_memory"
        )
    groups = placement.cut(ep).in_parts(etp).group_sizes_of_ranks
    if name == "hierarchical" and ranks_per_node not in (1, *groups):
        raise UserError(
            f"moe.transport is hierarchical, but the {ranks_per_node} ranks of a node are no group of the placement's "
            f"tree {placement.factors}; place again with --nodes {ranks // ranks_per_node}"
        )


def _token_files(paths: Path | dict[str, Path] | None, model: ModelConfig) -> dict[str, TokenFile]:
    named = {} if paths is None else {ONE: paths} if isinstance(paths, Path) else paths
    return {name: TokenFile(path, vocab_size=model.vocab_size) for name, path in named.items()}


def _check_data(run: Run) -> None:
    data = run.config.data
    # A first row of each is read, so that text of another vocabulary shows before the run folder is touched.
    blend = run.blend()
    if len(blend.names) == 1:
        check_rows(blend.rows[0], data.sequence_length, data.batch_size)
    blend.read([(domain, 0) for domain in range(len(blend.names))])
    blend.read(blend.ahead(data.batch_size))
    if data.reference_losses is not None:
        reference_losses(data.reference_losses, blend.names)
    sizes = {"sequence_length": data.sequence_length, "batch_size": data.batch_size}
    for file in run.heldout.values():
        next(heldout_batches(file, **sizes, num_batches=data.heldout_batches, packing=data.packing))
    for file in (*run.train.values(), *run.heldout.values()):
        if file.mask is not None and not file.mask.count_ids(2)[1]:
            raise UserError(
                f"loss mask {file.mask.bin_path} leaves none of {file.num_tokens} tokens to learn; tokenise again with "
                "a template that keeps responses"
            )
    if data.tokenizer is not None and tokenizer_folder(data.tokenizer) is None:
        raise UserError(
            f"data.tokenizer {data.tokenizer} holds no tokenizer files; give a Hugging Face tokenizer folder"
        )
    _check_vocabulary(run)


def _check_vocabulary(run: Run) -> None:
    """Ids of another tokenizer may be in range, and mean something else."""
    for file in (*run.train.values(), *run.heldout.values()):
        check_ids(file, run.model.vocab_size)
    folder = tokenizer_folder(run.config.data.tokenizer or run.checkpoint)
    vocabulary = read_vocabulary(folder) if folder else None
    if folder is None or vocabulary is None:
        return
    check_range(folder, vocabulary, run.model, "the model has")
    if run.checkpoint is not None:
        check_tokenizer(folder, vocabulary, run.checkpoint)
    for file in (*run.train.values(), *run.heldout.values()):
        check_token_file(file.bin_path.with_suffix(""), vocabulary, folder)
