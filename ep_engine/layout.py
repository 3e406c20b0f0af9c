"""Layout: whether the ranks of a job can share a model as the configuration asks, and the stages of its pipeline."""

from ep_engine.config import RunConfig, differing
from ep_engine.errors import UserError
from ep_engine.model_config import ModelConfig
from ep_engine.stages import Stages


def check_ranks(config: RunConfig, world_size: int) -> None:
    """UserError unless the sizes multiply up to the ranks of the job, and the batch divides."""
    parallel = config.parallel
    pp, tp, ep = parallel.pipeline_parallel_size, parallel.tensor_parallel_size, parallel.expert_parallel_size
    by_pp = f" times parallel.pipeline_parallel_size ({pp})" if pp > 1 else ""
    if world_size % (tp * pp):
        raise UserError(
            f"parallel.tensor_parallel_size ({tp}){by_pp} must divide the {world_size} ranks of the job (WORLD_SIZE); "
            "choose another number of ranks"
        )
    dp = parallel.data_parallel_size or world_size // (tp * pp)
    if dp * tp * pp != world_size:
        times = by_pp + (f" times parallel.tensor_parallel_size ({tp})" if tp > 1 else "")
        raise UserError(
            f"parallel.data_parallel_size ({dp}){times} needs {dp * tp * pp} ranks, but the job has {world_size} "
            f"(WORLD_SIZE); start torchrun with {dp * tp * pp}, or leave data_parallel_size out"
        )
    etp = parallel.expert_tensor_parallel_size
    if world_size % (pp * ep * etp):
        times = by_pp + (f" times parallel.expert_tensor_parallel_size ({etp})" if etp > 1 else "")
        raise UserError(
            f"parallel.expert_parallel_size ({ep}){times} must divide the {world_size} ranks of the job (WORLD_SIZE); "
            "choose another number of ranks"
        )
    parts = config.train.micro_batches
    if config.data.batch_size % (dp * parts):
        times = f" times train.micro_batches ({parts})" if parts > 1 else ""
        raise UserError(
            f"data.batch_size ({config.data.batch_size}) must be a multiple of the {dp} ranks that share it{times}; "
            "choose another size"
        )


def make_stages(config: RunConfig, model: ModelConfig) -> Stages:
    """The stages of the pipeline, if its schedule can run them."""
    parallel, parts = config.parallel, config.train.micro_batches
    size, schedule, lengths = parallel.pipeline_parallel_size, parallel.pipeline_schedule, parallel.pipeline_layers
    unread = [name for name in ("pipeline_schedule", "pipeline_layers") if name in differing(parallel)]
    if size == 1 and unread:
        raise UserError(f"parallel.{unread[0]} has no effect without parallel.pipeline_parallel_size; set that too")
    if size == 1:
        return Stages.of(model.num_layers, 1, schedule)
    if lengths is not None and sum(lengths) != model.num_layers:
        raise UserError(
            f"parallel.pipeline_layers {lengths} adds up to {sum(lengths)} layers, the model has {model.num_layers}; "
            "correct it"
        )
    per_rank = {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule)  # None: any number
    if lengths is not None and (len(lengths) % size or per_rank not in (None, len(lengths) // size)):
        wanted = f"{per_rank * size}" if per_rank else f"a multiple of {size}"
        raise UserError(
            f"parallel.pipeline_layers names {len(lengths)} stages, but schedule {schedule} on {size} ranks has "
            f"{wanted}; correct it"
        )
    num_stages = len(lengths) if lengths else size * (1 if per_rank == 1 else 2)
    if num_stages > model.num_layers:
        raise UserError(
            f"a pipeline of {num_stages} stages (parallel.pipeline_parallel_size {size}, schedule {schedule}) needs as "
            f"many layers, the model has {model.num_layers}; use fewer stages"
        )
    _check_schedule(config, model, parts)
    return Stages.of(model.num_layers, size, schedule, lengths)


def _check_schedule(config: RunConfig, model: ModelConfig, parts: int) -> None:
    parallel = config.parallel
    size, schedule = parallel.pipeline_parallel_size, parallel.pipeline_schedule
    if schedule == "1f1b" and parts < size:
        raise UserError(
            f"train.micro_batches ({parts}) must be at least parallel.pipeline_parallel_size ({size}) for schedule "
            "1f1b, or ranks would always wait; use more parts, or gpipe"
        )
    rounds = max(1, parts // size)
    if schedule == "interleaved" and parts % rounds:
        raise UserError(
            f"train.micro_batches ({parts}) must be a multiple of {rounds} rounds of {size} ranks for schedule "
            f"interleaved; use a multiple of {size}"
        )
    if schedule != "zbv":
        return
    # Gradients of weights are a pass of their own there, for which all that it needs must still be there.
    if config.train.recompute != "none":
        raise UserError(
            f"train.recompute is {config.train.recompute} and parallel.pipeline_schedule zbv, which would compute "
            "every layer a third time; leave one of them out"
        )
    if parallel.reshard_after_forward:
        raise UserError(
            "parallel.reshard_after_forward is set and parallel.pipeline_schedule is zbv, which needs the weights "
            "until the end of the step; leave one of them out"
        )
    if model.tie_embeddings:
        raise UserError(
            "parallel.pipeline_schedule is zbv, whose first rank has the embedding and the head, and the model's head "
            "is its embedding (tie_embeddings); use 1f1b or interleaved"
        )


def check_split(config: RunConfig, model: ModelConfig) -> None:
    """Whether tensor parallelism can cut everything evenly."""
    tp, moe = config.parallel.tensor_parallel_size, None if model.is_dense else model.moe
    cut = {
        "data.sequence_length": config.data.sequence_length,
        "the model's number of heads": model.num_heads,
        "the model's number of key/value heads": model.num_kv_heads,
        "the model's vocabulary": model.vocab_size,
        "the model's intermediate size": model.intermediate_size if model.moe is None else tp,
        "the width of the model's shared expert": tp if moe is None else moe.shared_hidden_size,
        "the width of the model's residual experts": tp if moe is None else moe.residual_hidden_size,
        **{f"the intermediate size of layer {layer}": width for layer, width in model.dense_layers.items()},
    }
    if tp > 1 and model.qk_norm == "all":
        raise UserError(
            f"parallel.tensor_parallel_size is {tp}, and the model norms queries and keys over all heads (qk_norm "
            "all), which lie on several ranks then; set it to 1"
        )
    for name, size in cut.items():
        if size % tp:
            raise UserError(f"parallel.tensor_parallel_size ({tp}) must divide {name} ({size}); choose a smaller one")
