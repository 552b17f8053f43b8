"""The equality matrix: every layout up to 8 ranks, held against one process of plain torch.

`python -m tests.distributed.matrix` (make test-matrix) runs all of it, first a case of every signature, continues where
an earlier run of the same code was ended, and writes what was proved to megalm/parallel/proved.json and what was
measured to docs/support.json. `python -m tests.distributed.matrix tuning` runs the cases of features that came later
(LATER) and adds them to what is proved.
tests/distributed/test_matrix.py runs a part that has every pair of choices in it.

A case is a layout and a set of features of model and data. All legal layouts are tried in fp32; in bf16 and fp16 the
smallest of each signature (megalm/parallel/proved.py). Which features a layout is tried with is drawn by its name.
"""

import hashlib
import itertools
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megalm.data import shards
from megalm.errors import MegalmError
from megalm.layout import Layout
from megalm.parallel import proved
from megalm.training.config import RunConfig
from megalm.training.plan import Plan, plan
from tests.distributed.ranks import Pool, RankFailed, run_ranks

STEPS, GLOBAL_BATCH, SEQUENCE = 3, 24, 16
SCALE_POWER = 10
EPS = 1e-3
"""Of AdamW, the size of a gradient here: where gradients are rounding noise, a small one would let the noise's sign
decide a whole step, in every layout another."""
VOCABULARY = 101  # not a multiple of any tensor degree
PRECISIONS = ("fp32", "bf16", "fp16")
DEGREES = {"pipeline": (1, 2, 3, 4, 8), "data": (1, 2, 3, 4, 8), "tensor": (1, 2, 4, 8)}
RANKS = 8
REPOSITORY = Path(__file__).resolve().parents[2]

MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "pad_vocab_to_multiple_of": 8,
}
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
APART = {"attend_across_documents": False}
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {"model": {"rope_scaling": {"kind": "llama3", "factor": 2.0, "original_max_position_embeddings": 8}}},
    "gpt": {
        "model": {
            **BIASES,
            "position": "learned",
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "z_loss": 1e-3,
            "vocab_size": VOCABULARY + 3,
        }
    },
    "qwen": {
        "model": {
            "qk_norm": True,
            "head_dim": 8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_scaling": {"kind": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
        },
        "data": APART,
    },
    "dropout": {
        "model": {
            "position": "sinusoidal",
            "norm": "layernorm",
            "activation": "gelu",
            "num_key_value_heads": 8,
            "hidden_dropout": 0.2,
            "attention_dropout": 0.2,
            "mlp_bias": True,
        }
    },
    "bloom": {
        "model": {
            **BIASES,
            "position": "alibi",
            "norm": "layernorm",
            "activation": "relu",
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
        "optimizer": {"gradient_clipping": 0.0},
    },
    "mistral": {"model": {"sliding_window": 5, "activation": "geglu"}, "data": APART},
    "bare": {"model": {"position": "none", "qk_norm": True, "z_loss": 1e-3, "hidden_dropout": 0.2}},
    "neox": {
        "model": {
            **BIASES,
            "norm": "layernorm",
            "activation": "gelu",
            "num_key_value_heads": 8,
            "rope_scaling": {"kind": "linear", "factor": 2.0},
            "rotary_fraction": 0.5,
            "parallel_residual": True,
        },
        "data": APART,
    },
    "frozen": {
        "model": {**BIASES, "tie_word_embeddings": True, "norm": "layernorm"},
        "tuning": {
            "freeze": ["embedding.*", "blocks.*.feed_forward.*", "blocks.0.attention.*"],
            "layer_decay": 0.8,
            "neftune_alpha": 5.0,
        },
    },
    "lora": {
        "model": {"attention_bias": True, "qk_norm": True},
        "tuning": {"method": "lora", "rank": 4, "also_train": ["*norm*"], "neftune_alpha": 5.0},
    },
    "dora": {
        "model": BIASES,
        "tuning": {"method": "dora", "rank": 4, "freeze": ["blocks.1.attention.*"], "layer_decay": 0.8},
    },
    "dora-heads": {
        "model": {"num_key_value_heads": 8},
        "tuning": {"method": "dora", "rank": 2, "targets": ["query", "value", "down"]},
    },
    "classes": {"model": {"head": "sequence_classification", "num_labels": 5, "tie_word_embeddings": True}},
    "tags": {"model": {"head": "token_classification", "num_labels": 7}, "data": APART},
    "spans": {"model": {"head": "question_answering", "num_labels": 2}, "data": APART},
}
"""Sets of features, each like a model that exists where there is one. Clipping bites in all but one of them."""


@dataclass(frozen=True)
class Case:
    """One layout, and the features it is tried with."""

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    sequence_parallel: bool = False
    schedule: str = "1f1b"
    zero: int = 1
    offload: bool = False
    recompute: str = "none"
    micro_batch: int = GLOBAL_BATCH // 2
    precision: str = "fp32"
    features: str = "llama"

    @property
    def size(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def layers(self) -> int:
        """Blocks: few, and for most numbers of stages uneven over them."""
        pieces = self.pipeline * (2 if self.schedule == "dualpipev" else 1)
        return next(layers for layers in (3, 5, 8, 17) if layers >= pieces)

    @property
    def effort(self) -> float:
        """Seconds of a core, very roughly: to start ranks, and to run blocks of micro-batches."""
        return 0.3 + 0.3 * self.size + 0.003 * self.layers * self.tensor * GLOBAL_BATCH / self.micro_batch

    @property
    def name(self) -> str:
        words = [f"{axis}{getattr(self, axis)}" for axis in ("pipeline", "data", "tensor")]
        words += ["sequence_parallel"] * self.sequence_parallel + [self.schedule] * (self.pipeline > 1)
        words += [f"zero{self.zero}"] + ["offload"] * self.offload
        words += [f"recompute_{self.recompute}"] * (self.recompute != "none")
        return "-".join([*words, f"micro{self.micro_batch}", self.precision, self.features])

    @property
    def reference(self) -> "Case":
        """The case that this one is held against: what is left of it without a layout."""
        blank = replace(Case(), precision=self.precision, features=self.features)
        return blank if blank.layers == self.layers else replace(blank, pipeline=self.pipeline, schedule=self.schedule)

    def config(self, corpus: Path) -> RunConfig:
        """Raises ValidationError."""
        features = FEATURES[self.features]
        tree: dict[str, Any] = {
            "run": {"directory": str(corpus / "run")},
            "model": {**MODEL, "num_layers": self.layers},
            "tuning": {},
            "data": {
                "sources": [{"path": str(corpus / "shards" / "train")}],
                "tokenizer": str(corpus / "tokenizer"),
                "prefetch": 0,
            },
            "train": {
                "steps": STEPS,
                "global_batch_size": GLOBAL_BATCH,
                "micro_batch_size": self.micro_batch,
                "sequence_length": SEQUENCE,
                "precision": self.precision,
            },
            "optimizer": {"learning_rate": 3e-3, "eps": EPS, "gradient_clipping": 0.5},
            "parallel": {
                "tensor": self.tensor,
                "sequence_parallel": self.sequence_parallel,
                "pipeline": self.pipeline,
                "pipeline_schedule": self.schedule,
                "zero": self.zero,
                "offload_optimizer": self.offload,
                "recompute": self.recompute,
                "allow_unproved": True,
            },
            "deepspeed": {"fp16": {"initial_scale_power": SCALE_POWER}},  # too low to overflow and skip steps
        }
        return RunConfig.model_validate({key: branch | features.get(key, {}) for key, branch in tree.items()})


@cache
def corpus() -> Path:
    """A folder with tokenizer/ and shards/train of short random documents; the same bytes every time."""
    folder = Path(tempfile.mkdtemp(prefix="megalm-matrix-"))
    vocabulary = {str(i): i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    document = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": VOCABULARY - 1,
                "content": "</s>",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "0"},
    }
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(document))
    random = np.random.default_rng(0)
    texts = (np.minimum(random.zipf(1.3, random.integers(1, 20)), VOCABULARY - 2) for _ in range(300))
    lines = (json.dumps({"text": " ".join(map(str, text))}) + "\n" for text in texts)
    (folder / "documents.jsonl").write_text("".join(lines))
    shards.write([folder / "documents.jsonl"], folder / "tokenizer", folder / "shards")
    return folder


@dataclass
class Matrix:
    """Every case, and what megalm refuses."""

    cases: dict[Case, Plan] = field(default_factory=dict)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Sentence without its numbers -> (how many layouts it refuses, the sentence for one of them)."""

    def signature(self, case: Case) -> dict[str, str]:
        planned = self.cases[case]
        return proved.signature(planned.config, planned.layout, planned.accumulation)

    def features(self, case: Case) -> dict[str, str]:
        planned = self.cases[case]
        return proved.features(planned.config, planned.layout)

    def refuse(self, error: ValidationError | MegalmError) -> None:
        sentence = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        sentence = sentence.removeprefix("Value error, ")
        kind = re.sub(r"\d+", "N", sentence)
        count, first = self.refused.get(kind, (0, sentence))
        self.refused[kind] = count + 1, first


ODD: list[dict[str, dict[str, Any]]] = [
    {"parallel": {"context": 2}},
    {"parallel": {"tensor": 3}},
    {"parallel": {"pipeline": 4}},
    {"parallel": {"tensor": 4, "sequence_parallel": True}, "train": {"sequence_length": 18}},
    {"parallel": {"tensor": 4}, "model": {"pad_vocab_to_multiple_of": 1}},
    {"parallel": {"tensor": 4}, "model": {"intermediate_size": 66}},
    {"parallel": {"tensor": 4}, "model": {"num_attention_heads": 24, "num_key_value_heads": 6, "head_dim": 4}},
    {"deepspeed": {"gradient_clipping": 1.0}},
]
"""What no case asks for and no layout could do: changes of the default case, on as many ranks as they need."""


def layouts() -> Iterator[Case]:
    """Every combination, legal or not, of up to RANKS ranks."""
    for pipeline, data, tensor in itertools.product(*DEGREES.values()):
        if pipeline * data * tensor > RANKS:
            continue
        accumulations = (1, 2, 4, GLOBAL_BATCH)  # the last only for DualPipeV, which needs many micro-batches
        for schedule in ("1f1b", "dualpipev"):
            chosen = accumulations if schedule == "dualpipev" else accumulations[:-1]
            sizes = sorted({max(1, -(-GLOBAL_BATCH // (data * number))) for number in chosen}, reverse=True)
            for options in itertools.product(
                (False, True), (0, 1, 2, 3), (False, True), ("none", "selective", "full"), sizes, PRECISIONS
            ):
                sequence_parallel, zero, offload, recompute, micro_batch, precision = options
                yield Case(
                    pipeline,
                    data,
                    tensor,
                    sequence_parallel,
                    schedule,
                    zero,
                    offload,
                    recompute,
                    micro_batch,
                    precision,
                )


@cache
def matrix() -> Matrix:
    """Legal is what megalm's own config and plan let pass."""
    found = Matrix()
    halves: dict[str, tuple[Case, Plan]] = {}
    for blank in layouts():
        number = int.from_bytes(hashlib.blake2b(blank.name.encode(), digest_size=8).digest(), "little")
        case = replace(blank, features=list(FEATURES)[number % len(FEATURES)])
        try:
            config = case.config(corpus())
            layout = Layout.of(case.size, tensor=case.tensor, pipeline=case.pipeline)
            accumulation = layout.accumulation(GLOBAL_BATCH, case.micro_batch)
            signature = proved.signature_name(proved.signature(config, layout, accumulation))
            if case.precision == "fp32":
                found.cases[case] = plan(config, case.size)
            elif signature not in halves or case.size < halves[signature][0].size:
                halves[signature] = case, plan(config, case.size)
        except (ValidationError, MegalmError) as error:
            found.refuse(error)
    found.cases |= dict(halves.values())
    tree = Case().config(corpus()).model_dump()
    for change in ODD:
        ranks = max((degree for degree in change.get("parallel", {}).values() if degree is not True), default=1)
        try:
            plan(RunConfig.model_validate(tree | {key: tree[key] | keys for key, keys in change.items()}), ranks)
        except (ValidationError, MegalmError) as error:
            found.refuse(error)
        else:
            raise AssertionError(f"{change} is accepted: it belongs into the cases")
    return found


def covering(whole: Matrix) -> list[Case]:
    """Few cases with every pair of axis values, and every feature under every axis value, that is in the matrix."""
    wanted: dict[str, int] = {}

    @cache
    def bit(name: str) -> int:
        return 1 << wanted.setdefault(name, len(wanted))

    def mask(case: Case) -> int:
        signature = whole.signature(case)
        values = [f"{axis} {value}" for axis, value in signature.items()]
        names = [" + ".join(pair) for pair in itertools.combinations(values, 2)]
        return sum(map(bit, names + proved.pair_names(signature, whole.features(case))))

    masks = {case: mask(case) for case in whole.cases}
    missing, chosen = (1 << len(wanted)) - 1, []
    while missing:
        best = max(masks, key=lambda case: ((masks[case] & missing).bit_count() / case.effort, case.name))
        missing &= ~masks[best]
        chosen.append(best)
    return chosen


# --- Running ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a case went. problems: comparison -> sentences, empty if it holds. worst: quantity -> (distance, its
    tolerance, step or tensor) of the number that comes closest to its tolerance."""

    name: str
    problems: dict[str, list[str]]
    worst: dict[str, tuple[float, float, str]]
    seconds: float


class Runner:
    """Runs cases over workers, each of which has one pool of ranks at a time."""

    def __init__(self, cases: Sequence[Case], workers: int = 2, shared_memory: bool = False) -> None:
        """Cases of one number of ranks run one after the other, so that pools last. shared_memory: ranks talk over it,
        two to three times as fast as over gloo."""
        self._shared_memory = shared_memory
        self._results: dict[Case, Future[Result]] = {case: Future() for case in cases}
        self._expected: dict[Case, Future[Any]] = {}
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
        for case in sorted(cases, key=lambda case: case.size):
            self._waiting.put(case)
        for _ in range(workers):
            threading.Thread(target=self._work, daemon=True).start()

    def result(self, case: Case) -> Result:
        """Waits for it. Raises RankFailed if a rank raised."""
        return self._results[case].result()

    def _work(self) -> None:
        pool: Pool | None = None
        while True:
            try:
                case = self._waiting.get_nowait()
            except queue.Empty:
                break
            if pool is None or pool.size != case.size or not pool.usable:
                if pool is not None:
                    pool.close()
                pool = Pool(case.size, self._shared_memory)
            try:
                self._results[case].set_result(self._run(case, pool))
            except BaseException as error:
                self._results[case].set_exception(error)
        if pool is not None:
            pool.close()

    def _run(self, case: Case, pool: Pool) -> Result:
        from tests.distributed import comparison

        wanted = self._wanted(case)
        started = time.perf_counter()
        shares = pool.run(comparison.record, case.config(corpus()))
        return judge(case.name, shares, wanted, time.perf_counter() - started)

    def _wanted(self, case: Case) -> Any:
        with self._lock:
            mine = case.reference not in self._expected
            future = self._expected.setdefault(case.reference, Future())
        if mine:
            try:
                future.set_result(expected(case))
            except BaseException as error:
                future.set_exception(error)
        return future.result()


def expected(case: Case) -> Any:
    """comparison.Expected of a case, from a process of its own."""
    from tests.distributed import comparison

    [wanted] = run_ranks(1, comparison.expected, case.config(corpus()))
    return wanted


def judge(name: str, shares: Any, wanted: Any, seconds: float = 0.0) -> Result:
    from tests.distributed import comparison

    problems, distances = comparison.problems(shares, wanted)
    worst = {}
    for quantity, each in distances.items():
        where = max(each, key=lambda name: each[name] / wanted.tolerance[quantity][name])
        worst[quantity] = (each[where], wanted.tolerance[quantity][where], where)
    return Result(name, problems, worst, seconds)


# --- Everything ------------------------------------------------------------------------------------------------------

RESULTS = REPOSITORY / "runs" / "matrix.jsonl"
SUPPORT = REPOSITORY / "docs" / "support.json"
PROVED = REPOSITORY / "megalm" / "parallel" / "proved.json"


def code() -> str:
    """A hash of all that decides results: of megalm what a rank has imported, what runs it, and the libraries."""
    [imported] = run_ranks(1, _imported, Case(features="lora").config(corpus()))
    ours = {path for path in Path(__file__).parent.glob("*.py") if not path.name.startswith("test_")}
    hashed = hashlib.blake2b(json.dumps(versions()).encode(), digest_size=16)
    for path in sorted({*imported, *ours}):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def versions() -> dict[str, str]:
    return {name: version(name).split("+")[0] for name in ("torch", "deepspeed", "megatron-core")}


def _imported(config: RunConfig) -> list[Path]:
    from tests.distributed import comparison

    comparison.record(config)
    files = {Path(file) for module in sys.modules.values() if (file := getattr(module, "__file__", None))}
    return [file for file in files if file.is_relative_to(REPOSITORY / "megalm")]


def remembered(hashed: str) -> dict[str, Result]:
    """Results of an earlier run of the code with this hash, by name."""
    if not RESULTS.exists():
        return {}
    first, *lines = RESULTS.read_text().splitlines()
    return {result["name"]: Result(**result) for result in map(json.loads, lines)} if first == hashed else {}


def representatives(whole: Matrix) -> list[Case]:
    """The least of the cases that has every signature, and every feature under every axis value."""
    seen: set[str] = set()
    chosen = []
    for case in sorted(whole.cases, key=lambda case: (case.effort, case.name)):
        signature = whole.signature(case)
        names = {proved.signature_name(signature), *proved.pair_names(signature, whole.features(case))}
        if names - seen:
            seen |= names
            chosen.append(case)
    return chosen


def run(cases: Sequence[Case]) -> dict[Case, Result]:
    """Run those of the cases that were not run before, with a line of progress each."""
    hashed = code()
    known = remembered(hashed)
    results = {case: known[case.name] for case in cases if case.name in known}
    waiting = sorted((case for case in cases if case not in results), key=lambda case: case.size)
    print(f"{len(cases)} cases, {len(results)} of them done before", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a" if known else "w") as file:
        if not known:
            file.write(hashed + "\n")
        runner, started = Runner(waiting, shared_memory=hasattr(os, "memfd_create")), time.perf_counter()
        work, done = sum(case.effort for case in waiting), 0.0
        for number, case in enumerate(waiting, 1):
            try:
                result = runner.result(case)
            except RankFailed as error:
                result = Result(case.name, {"run": [str(error)]}, {}, 0.0)
            results[case] = result
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
            done += case.effort
            spent = time.perf_counter() - started
            left = spent / done * (work - done)
            verdict = "holds" if not result.problems else f"FAILS: {json.dumps(result.problems)}"
            print(f"{number}/{len(waiting)}, {left / 60:.0f} min left: {case.name} {verdict}", flush=True)
    return results


def write(results: dict[Case, Result]) -> None:
    """What holds, for megalm to look up; what was measured, for docs/support.md."""
    whole = matrix()
    holds = [case for case in results if not results[case].problems]
    failed = {proved.signature_name(whole.signature(case)) for case in results if results[case].problems}
    signatures = {proved.signature_name(whole.signature(case)) for case in holds} - failed
    pairs = {name for case in holds for name in proved.pair_names(whole.signature(case), whole.features(case))}
    PROVED.write_text(_json({"signatures": sorted(signatures), "pairs": sorted(pairs)}))
    closest: dict[str, dict[str, dict[str, Any]]] = {precision: {} for precision in PRECISIONS}
    for case in sorted(holds, key=lambda case: case.name):
        for quantity, (distance, tolerance, where) in results[case].worst.items():
            best = closest[case.precision].get(quantity)
            if best is None or distance / tolerance > best["distance"] / best["tolerance"]:
                found = {"distance": distance, "tolerance": tolerance, "where": where, "case": case.name}
                closest[case.precision][quantity] = found
    for each in closest.values():
        for found in each.values():
            found |= {key: float(f"{found[key]:.2g}") for key in ("distance", "tolerance")}
    content = {
        "versions": versions(),
        "cases": dict(sorted(Counter(case.precision for case in holds).items())),
        "legal": dict(sorted(Counter(case.precision for case in whole.cases).items())),
        "layouts": len({(case.pipeline, case.data, case.tensor) for case in holds}),
        "failed": {case.name: results[case].problems for case in results if results[case].problems},
        "closest": closest,
        "refused": [{"layouts": count, "sentence": sentence} for count, sentence in whole.refused.values()],
    }
    SUPPORT.write_text(_json(content))


TUNED = [
    Case(tensor=2, zero=0, micro_batch=GLOBAL_BATCH),
    Case(data=2, zero=3, recompute="full", micro_batch=6, precision="bf16"),
    Case(data=2, tensor=2, sequence_parallel=True, zero=2, offload=True, recompute="selective", precision="fp16"),
    Case(pipeline=2, micro_batch=6, precision="bf16"),
    Case(pipeline=2, tensor=2, sequence_parallel=True, schedule="dualpipev", micro_batch=6),
]
"""Layouts that have every value of every axis, for features that came after the last run of everything."""
LATER = {
    "tuning": [
        *(replace(case, features=features) for features in ("frozen", "lora", "dora") for case in TUNED),
        Case(pipeline=3, offload=True, micro_batch=6, precision="fp16", features="frozen"),  # a group, four, five
        Case(tensor=4, features="lora"),  # keys and values that all ranks hold whole
        Case(tensor=4, sequence_parallel=True, features="dora"),
    ]
}
"""Name -> the cases that prove it beside what is proved already."""


def add(cases: Sequence[Case]) -> int:
    """Run cases and add what holds to proved.json, whose own cases had none of the new features; returns the failures.

    So features that are added while everything runs on the code before them need not wait for the next such run: take
    its proved.json and add to it.
    """
    results = run(cases)
    plans = {case: plan(case.config(corpus()), case.size) for case in results if not results[case].problems}
    content = json.loads(PROVED.read_text())
    signatures, pairs = set(content["signatures"]), set(content["pairs"])
    known = {pair.split()[0] for pair in pairs}
    plain = plan(Case().config(corpus()), 1)
    before = proved.features(plain.config, plain.layout)
    without = {feature: before[feature] for feature in before if feature not in known}
    for name in content["signatures"]:
        there = dict(zip(proved.AXES, name.split(proved.SEPARATOR), strict=True))
        pairs.update(proved.pair_names(there, without))
    for planned in plans.values():
        signature = proved.signature(planned.config, planned.layout, planned.accumulation)
        signatures.add(proved.signature_name(signature))
        pairs.update(proved.pair_names(signature, proved.features(planned.config, planned.layout)))
    PROVED.write_text(_json({"signatures": sorted(signatures), "pairs": sorted(pairs)}))
    return len(results) - len(plans)


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    if later := sys.argv[1:]:
        failures = add([case for name in later for case in LATER[name]])
        print(f"{failures} cases do not hold; run tools/write_support_docs.py")
        sys.exit(failures > 0)
    # First what proves every signature, so that a run that is ended early has proved all it can.
    write(run(representatives(matrix())))
    everything = run(list(matrix().cases))
    write(everything)
    failures = sum(1 for result in everything.values() if result.problems)
    print(f"{len(everything) - failures} cases hold, {failures} do not; run tools/write_support_docs.py")
    sys.exit(failures > 0)
