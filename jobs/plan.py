"""Plan: what a training of a language model needs and how long its steps should take, before anything starts."""

import json as jsonlib
from dataclasses import asdict, dataclass

from jobs.train import TrainRecipe
from model.transformer import TRANSFORMER_SIZES, TransformerConfig
from schemas.errors import ConfigError
from train.gpus import GIB, Gpu, gpu_named
from train.planner import ALWAYS, MemoryPlan, Workload, check_memory, gib, plan_memory
from train.step_time import EFFICIENCY, StepTime, expected_step

PAIR_LEN = 2 * 8400  # two drawings of 720 x 720, and what was asked


@dataclass(frozen=True)
class TrainingPlan:
    """What each worker holds, and the step that is to be expected; on a CPU neither a limit nor a time is known. `fewest` is
    what a worker has to do while there are but `min_workers`.
    """

    load: Workload
    fewest: Workload | None
    memory: MemoryPlan
    gpu: Gpu | None
    step: StepTime | None

    @property
    def peak_of_fewest(self) -> float:
        """Bytes that a worker holds at most while there are but `min_workers`; 0 if there are never fewer."""
        return plan_memory(self.fewest).peak if self.fewest else 0.0

    def check(self) -> None:
        """Raises: ConfigError if a worker's GPU cannot hold it."""
        if self.gpu is None:
            return
        gpu = f"the GPU {self.gpu.name!r}"
        check_memory(self.load, self.gpu.memory_gib * GIB, gpu)
        if self.fewest is not None:
            where = f"{gpu} (of {self.fewest.num_workers} workers, which min_workers allows)"
            check_memory(self.fewest, self.gpu.memory_gib * GIB, where)


def plan_training(recipe: TrainRecipe, gpu: str, context_len: int | None, document_len: int | None) -> TrainingPlan:
    """A recipe -> its plan, with the vocabulary of the named size, and rows as long as its model allows unless given.

    Raises: ConfigError if it trains no language model, or nothing of that name is known.
    """
    kind = gpu_named(gpu)
    if recipe.pretrain is not None:
        architecture = recipe.pretrain.transformer_config(TRANSFORMER_SIZES[recipe.pretrain.size].vocab_size)
        longest = usual = architecture.max_position_embeddings
        execution = recipe.pretrain.execution
    elif recipe.dpo is not None:  # its weights are not known here: those of the published size
        architecture, usual = TRANSFORMER_SIZES["8b"], PAIR_LEN
        longest = 2 * architecture.max_position_embeddings
        execution = recipe.dpo.execution
    else:
        raise ConfigError(
            f"found the objective {recipe.objective!r}, expected 'pretrain' or 'dpo': only language models are planned"
        )
    if context_len is not None and not 1 <= context_len <= longest:
        raise ConfigError(f"found the context {context_len}, expected 1 to {longest}, what the model can see")
    if document_len is not None and document_len < 1:
        raise ConfigError(f"found documents of {document_len} tokens, expected 1 or more")
    load = _workload(recipe, architecture, context_len or usual, execution.num_workers)
    least = execution.min_workers
    fewest = _workload(recipe, architecture, context_len or usual, least) if least else None
    step = expected_step(load, kind, document_len) if kind else None
    return TrainingPlan(load, fewest, plan_memory(load), kind, step)


def _workload(recipe: TrainRecipe, architecture: TransformerConfig, row_len: int, num_workers: int) -> Workload:
    """What a worker has to do when there are so many."""
    if recipe.pretrain is not None:
        return recipe.pretrain.by_workers(num_workers).workload(architecture.vocab_size, row_len)
    assert recipe.dpo is not None
    return recipe.dpo.by_workers(num_workers).workload(architecture, row_len)


def print_plan(plan: TrainingPlan, json: bool) -> None:
    """A plan -> a table for people, or one JSON document."""
    if json:
        print(jsonlib.dumps(_document(plan)))
        return
    load, layout = plan.load, plan.load.layout
    print(
        f"{load.num_workers} workers, shard {layout.shard} x context {layout.context} x tensor {layout.tensor}, "
        f"{layout.compute}: {load.rows_at_once} rows of {load.row_len} tokens at once, {load.parts} times a step\n"
    )
    width = max(len(row.name) for row in plan.memory.rows)
    for row in plan.memory.rows:
        when = "always" if row.moments == ALWAYS else ", ".join(row.moments)
        print(f"{row.name:<{width}}  {gib(row.num_bytes):>7} GiB  {when:<14}  {row.reason}")
    sums = ", ".join(f"{moment} {gib(plan.memory.at(moment))}" for moment in plan.memory.moments)
    print(f"{'at most':<{width}}  {gib(plan.memory.peak):>7} GiB  {plan.memory.worst:<14}  {sums}")
    if plan.fewest is not None:
        most = gib(plan.peak_of_fewest)
        print(f"{f'{plan.fewest.num_workers} workers alone':<{width}}  {most:>7} GiB  {plan.fewest.parts} times a step")
    if plan.gpu is not None and plan.step is not None:
        print(f"{plan.gpu.name:<{width}}  {plan.gpu.memory_gib:>7.2f} GiB\n\n{_speed(plan.step)}")


def _speed(step: StepTime) -> str:
    return (
        f"a step of {step.tokens:,} tokens: {step.step_s:.1f} s (compute {step.compute_s:.1f} s at {EFFICIENCY:.0%} of the "
        f"peak, links {step.links_s:.1f} s meanwhile, then memory {step.memory_s:.1f} s)\n"
        f"{step.tokens_per_s_per_gpu:,.0f} tokens/s/GPU, MFU {step.mfu:.1%}, "
        f"{step.days_per_trillion_tokens:,.0f} days per trillion tokens"
    )


def _document(plan: TrainingPlan) -> dict[str, object]:
    memory, gpu, step = plan.memory, plan.gpu, plan.step
    return {
        "rows": [asdict(row) for row in memory.rows],
        "peak_bytes": memory.peak,
        "worst": memory.worst,
        "gpu": asdict(gpu) if gpu else None,
        "fewest": {"num_workers": plan.fewest.num_workers, "peak_bytes": plan.peak_of_fewest} if plan.fewest else None,
        "fits": gpu is None or max(memory.peak, plan.peak_of_fewest) <= gpu.memory_gib * GIB,
        "step": {
            **asdict(step),
            "step_s": step.step_s,
            "days_per_trillion_tokens": step.days_per_trillion_tokens,
        }
        if step
        else None,
    }
