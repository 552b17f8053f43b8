"""The whole run: one tree, each branch owned by the package that uses it."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megalm.checkpoint.config import CheckpointConfig
from megalm.config import Config
from megalm.data.config import DataConfig
from megalm.metrics import flops
from megalm.metrics.config import LoggingConfig
from megalm.models.config import ModelConfig, TuningConfig
from megalm.nn.config import Recompute
from megalm.optim.config import OptimizerConfig, ScheduleConfig
from megalm.parallel.config import ParallelConfig
from megalm.parallel.deepspeed_config import check_pass_through
from megalm.sft.config import ANSWERED, TaskConfig, scores_of
from megalm.sft.metrics import GREATER_IS_BETTER


class RunSection(Config):
    """What the run is called and what its randomness starts from."""

    directory: str
    """Folder of the run: config, metrics, picture and checkpoints."""
    seed: NonNegativeInt = 1234
    """Seed of weights, sample order and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where there is one."""
    preflight: bool = True
    """Look, in seconds and before anything is loaded, whether code, config, folders, clocks, collectives and speeds of
    all machines fit together."""


class TrainSection(Config):
    """Length, batch and precision."""

    steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: PositiveInt
    """Sequences per step, over all ranks and accumulation."""
    micro_batch_size: PositiveInt
    """Sequences per forward pass of one rank."""
    sequence_length: PositiveInt
    """Tokens a sequence predicts."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic of the forward and backward pass; master weights and optimizer are fp32."""
    deterministic: bool = False
    """On a GPU, only kernels that give the same bits in every run, at some speed, so that a run resumes bitwise. A
    CPU's always do."""
    compile: Literal[True, False, "auto"] = "auto"
    """Let torch.compile fuse what stands around the matrix products of each block: norms, rotation, activation, sums.
    It needs parallel.zero 0 to 2, fp32 or bf16, rows of one length and no dropout, and takes about half a minute at the
    first step. `auto`: on a GPU, where all that holds."""
    fp8: bool = False
    """Multiply the matrices of all blocks in float8, by torchao: for models of a billion parameters or more on a GPU of
    compute capability 8.9 or newer, with train.compile; a CPU emulates it. It needs bf16, parallel.tensor 1,
    parallel.pipeline 1, parallel.zero 1 or 2 and no adapters. The curve stays near that of bf16."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """What a step with a non-finite loss or gradient norm does. `rollback` reloads the newest checkpoint."""
    on_spike: Literal["ignore", "stop", "skip", "rollback"] = "ignore"
    """What a step whose gradient norm is above spike_factor times its running mean does."""
    spike_factor: PositiveFloat = 10.0
    """See on_spike."""
    max_anomalies: PositiveInt = 10
    """Skips and rollbacks after which the run stops."""


class EvaluateSection(Config):
    """Held-out loss and scores during training, and what follows from them."""

    every: NonNegativeInt = 0
    """Steps between evaluations; the last step always evaluates. 0: only the last."""
    epochs: NonNegativeFloat = 0.0
    """Passes over data.sources between evaluations, in place of `every`: 1 evaluates after each, 0.5 twice in each."""
    sequences: PositiveInt = 64
    """Sequences per held-out corpus, spread evenly over it and always the same."""
    max_new_tokens: NonNegativeInt = 0
    """chat, dialogue, summarization, translation: the model answers what these sequences ask, greedily and in so many
    tokens at most, and its answers are scored. Each token takes a pass over the sequences. 0: no answers."""
    metric: str = "loss"
    """What patience and keep_best go by: `loss`, `bits_per_byte` or a score of the task. Of several held-out corpora,
    their mean."""
    greater_is_better: bool | None = None
    """Of that metric. Default: known for every metric of megalm's own."""
    patience: NonNegativeInt = 0
    """Evaluations without a better one after which the run stops, saved and done. 0: never."""
    keep_best: bool = False
    """Save the checkpoint of each evaluation that is the best so far, keep it whatever checkpoint.keep_last says, and
    let RUN/checkpoints/best name it."""

    @property
    def selects(self) -> bool:
        """Whether anything follows from an evaluation."""
        return bool(self.patience or self.keep_best)

    @property
    def greater(self) -> bool:
        """Whether a greater value of the metric is better."""
        return GREATER_IS_BETTER[self.metric] if self.greater_is_better is None else self.greater_is_better

    @model_validator(mode="after")
    def _consistent(self) -> "EvaluateSection":
        if self.every and self.epochs:
            raise ValueError(
                f"evaluate.every {self.every} and evaluate.epochs {self.epochs:g} exclude each other: set one"
            )
        if self.greater_is_better is None and self.metric not in GREATER_IS_BETTER:
            raise ValueError(
                f"evaluate.metric {self.metric} is not one of megalm's ({', '.join(GREATER_IS_BETTER)}): correct it, "
                "or say with evaluate.greater_is_better which way is better"
            )
        return self


class RunConfig(Config):
    """A training run."""

    run: RunSection
    """Name and seed."""
    model: ModelConfig = ModelConfig()
    """The network."""
    tuning: TuningConfig = TuningConfig()
    """What of it is trained."""
    data: DataConfig = DataConfig()
    """Samples."""
    train: TrainSection
    """Length, batch, precision."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks."""
    task: TaskConfig | None = None
    """Fine-tuning on rows of labelled data. Default: pretraining on shards."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    evaluate: EvaluateSection = EvaluateSection()
    """Held-out loss and scores."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Passed to DeepSpeed for what megalm does not name; a key megalm owns is refused."""

    @property
    def segmented(self) -> bool:
        """Whether a row holds several documents that do not see one another. Packed examples always are; the padding
        behind a single one is seen by none of its tokens."""
        return not self.data.attend_across_documents if self.task is None else self.task.arrangement == "packed"

    def flops_per_token(self) -> dict[str, float]:
        """FLOPs of training per token by three conventions: `6n`, the matrices alone; `full`, 6 N + 12 L H Q T (PaLM);
        `causal`, attention halved. N are the weights that a token is multiplied with, the head among them."""
        model = self.model
        matrices = flops.matmul_parameters(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.key_value_heads,
            head_dim=model.head_width,
            intermediate_size=model.feed_forward_width,
            gated=model.gated,
            vocab_size=model.padded_vocab_size(),
        )

        def with_attention(causal: bool) -> float:
            return flops.flops_per_token(
                matrices,
                num_layers=model.num_layers,
                num_attention_heads=model.num_attention_heads,
                head_dim=model.head_width,
                sequence_length=self.train.sequence_length,
                sliding_window=model.sliding_window,
                causal=causal,
            )

        return {"6n": 6.0 * matrices, "full": with_attention(False), "causal": with_attention(True)}

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        train, parallel = self.train, self.parallel
        if train.global_batch_size % train.micro_batch_size:
            choice = max(1, round(train.global_batch_size / train.micro_batch_size)) * train.micro_batch_size
            raise ValueError(
                f"train.global_batch_size {train.global_batch_size} is not a multiple of "
                f"train.micro_batch_size {train.micro_batch_size}: the nearest legal one is {choice}"
            )
        if train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length {train.sequence_length} is above model.max_position_embeddings "
                f"{self.model.max_position_embeddings}: raise the latter"
            )
        if parallel.sequence_parallel and train.sequence_length % parallel.tensor:
            raise ValueError(
                f"train.sequence_length {train.sequence_length} is not a multiple of parallel.tensor "
                f"{parallel.tensor}, which parallel.sequence_parallel needs: set it to "
                f"{max(1, train.sequence_length // parallel.tensor) * parallel.tensor}, or turn that off"
            )
        if self.schedule.total_steps is None:
            self.schedule.fit(train.steps, "train.steps")
        if parallel.zero == 0 and train.precision != "fp32":
            raise ValueError(
                f"parallel.zero 0 with train.precision {train.precision} would accumulate gradients in "
                f"{train.precision}: set parallel.zero to 1, which keeps fp32 ones"
            )
        for key, on, why in (
            ("compile", train.compile is True, self._uncompiled()),
            ("fp8", train.fp8, self._not_in_float8()),
        ):
            if on and why:
                raise ValueError(f"train.{key} is not proved with {why}: change that, or leave train.{key} out")
        if parallel.recompute == "auto" and (why := self.unpredicted()):
            raise ValueError(
                f"parallel.recompute auto goes by a step's predicted memory, and none is predicted with {why}: set "
                "parallel.recompute to none, selective or full"
            )
        check_pass_through(self.deepspeed)
        held_out = [source.path for source in self.data.held_out]
        if twice := sorted({path for path in held_out if held_out.count(path) > 1}):
            raise ValueError(f"data.held_out names {twice[0]} twice: name each corpus once")
        if self.evaluate.selects and not held_out:
            key = "patience" if self.evaluate.patience else "keep_best"
            raise ValueError(f"evaluate.{key} needs something to evaluate: name a corpus in data.held_out")
        answers = self.evaluate.max_new_tokens > 0
        if answers and (self.task is None or self.task.kind not in ANSWERED or self.task.train_on == "all"):
            why = "task.train_on all does not tell answers from questions" if self.task else "there is no task"
            if self.task and self.task.kind not in ANSWERED:
                why = f"a row of {self.task.kind} has no answer that is written"
            raise ValueError(f"evaluate.max_new_tokens asks for answers, and {why}: leave it out")
        if answers and not held_out:
            raise ValueError(
                "evaluate.max_new_tokens needs questions that are held out: name a corpus in data.held_out"
            )
        known = scores_of(self.task, answers)
        if self.evaluate.metric not in known:
            way = ", or set evaluate.max_new_tokens" if self.evaluate.metric in scores_of(self.task, True) else ""
            raise ValueError(
                f"evaluate.metric {self.evaluate.metric} is not among what this run's evaluations say "
                f"({', '.join(known)}): name one of these{way}"
            )
        if not self.data.sources:
            raise ValueError("data.sources is empty: name at least one shard folder")
        if not self.data.tokenizer:
            raise ValueError("data.tokenizer is empty: name the tokenizer the shards were written with")
        return self

    def with_recompute(self, recompute: Recompute) -> "RunConfig":
        """The same run with another parallel.recompute."""
        return self.model_copy(update={"parallel": self.parallel.model_copy(update={"recompute": recompute})})

    def unpredicted(self) -> str:
        """What keeps the memory of a step from being predicted (training/memory.py); empty if nothing does."""
        parallel, tuning = self.parallel, self.tuning
        reasons = {
            f"parallel.tensor {parallel.tensor}": parallel.tensor > 1,
            f"parallel.pipeline {parallel.pipeline}": parallel.pipeline > 1,
            f"parallel.zero {parallel.zero}": parallel.zero != 1,
            "parallel.offload_optimizer": parallel.offload_optimizer,
            f"train.precision {self.train.precision}": self.train.precision != "bf16",
            f"tuning.method {tuning.method}": tuning.adapts,
            "tuning.freeze": bool(tuning.freeze),
        }
        return _first(reasons)

    def compiles(self, device: str) -> bool:
        """Whether blocks are compiled on a `cpu` or `cuda` device."""
        if self.train.compile == "auto":
            return device == "cuda" and not self._uncompiled()
        return self.train.compile

    def _plain_only(self) -> dict[str, bool]:
        """What keeps both train.compile and train.fp8 from being used, and whether it holds."""
        return {
            "parallel.zero 3": self.parallel.zero == 3,
            "train.deterministic": self.train.deterministic,
            "tuning.head_first_steps": self.tuning.head_first_steps > 0,
            "rows of several lengths (task.arrangement padded or sorted)": self.task is not None and not self.segmented,
        }

    def _uncompiled(self) -> str:
        """What keeps train.compile from being used; empty if nothing does."""
        reasons = {
            "train.precision fp16": self.train.precision == "fp16",
            "model.norm_implementation apex": self.model.norm_implementation == "apex",
            # Each block has keys of its own, and would be compiled by itself.
            "dropout": self.model.hidden_dropout > 0 or self.model.attention_dropout > 0,
        }
        return _first(self._plain_only() | reasons)

    def _not_in_float8(self) -> str:
        """What keeps train.fp8 from being used; empty if nothing does."""
        model, train, parallel = self.model, self.train, self.parallel
        sizes = {
            "model.hidden_size": model.hidden_size,
            "the width of all heads": model.num_attention_heads * model.head_width,
            "the width of all key heads": model.key_value_heads * model.head_width,
            "model.intermediate_size": model.feed_forward_width,
            "train.micro_batch_size x train.sequence_length": train.micro_batch_size * train.sequence_length,
        }
        reasons = {
            f"train.precision {train.precision}": train.precision != "bf16",
            f"parallel.tensor {parallel.tensor}": parallel.tensor > 1,
            f"parallel.pipeline {parallel.pipeline}": parallel.pipeline > 1,
            "parallel.offload_optimizer": parallel.offload_optimizer,
            f"tuning.method {self.tuning.method}": self.tuning.adapts,
        }
        reasons |= {f"{name} {size} (no multiple of 16)": bool(size % 16) for name, size in sizes.items()}
        return _first(self._plain_only() | reasons)


def _first(reasons: dict[str, bool]) -> str:
    """The first that holds; empty if none does."""
    return next((what for what, holds in reasons.items() if holds), "")
