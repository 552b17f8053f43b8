"""EleutherAI's lm-evaluation-harness over megalm's own model, at any tensor and data degree.

Every rank is given all requests, scores its data-parallel share of the batches and collects the others' results, so
that each rank holds all of them: batches can be of equal lengths wherever requests came from, and no rank is given
requests again to fill up its share.
"""

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, hash_string, make_disjoint_window
from tqdm import tqdm

from megalm.errors import MegalmError
from megalm.eval.generate import Sampling, collect, generate
from megalm.eval.scoring import score
from megalm.eval.tasks import load_tasks
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.chat import Chat

logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Ranks(Protocol):
    """The ranks that evaluate together (parallel.groups.Groups)."""

    @property
    def rank(self) -> int: ...
    @property
    def data_rank(self) -> int: ...
    @property
    def data_size(self) -> int: ...
    def gather(self, item: Any) -> list[Any]: ...


class Alone:
    """One process."""

    rank, data_rank, data_size = 0, 0, 1

    def gather(self, item: Any) -> list[Any]:
        return [item]


class HarnessModel(TemplateLM):
    """What the harness asks: loglikelihood, loglikelihood_rolling and generate_until. Every rank calls each.

    The model sees its last max_position_embeddings ids, as Hugging Face's adapter has it: a long context loses its
    beginning.
    """

    def __init__(
        self,
        model: LayerList,
        config: ModelConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        ranks: Ranks | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        chat: Chat | None = None,
    ) -> None:
        """batch_size: rows in one pass. max_new_tokens: where a task does not say. seed: of sampled generations. chat:
        what writes requests, if run_tasks() is told to apply a chat template."""
        super().__init__()
        self._model = model
        self._config = config
        self._text = tokenizer
        self._batch_size = batch_size
        self._ranks = ranks or Alone()
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._chat = chat
        self._left_out = False  # system messages
        self._device = next(model.parameters()).device

    @property
    def max_length(self) -> int:
        return self._config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: what begins documents, else what ended the one before."""
        return self._text.eos_id if self._text.bos_id is None else self._text.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """A text's ids, behind what begins documents unless add_special_tokens is False. A chat begins as its template
        says, as it does when the model is tuned and when it answers."""
        if self._chat and add_special_tokens is None:
            return self._chat.ids(string)
        begins = [] if add_special_tokens is False else self._text.begins
        return [*begins, *self._text.encode(string)]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model reads it, up to where its answer begins, or has begun with the last message.

        As Hugging Face's adapter has it, system messages are left out, with a warning, where the template has no place
        for them. Raises MegalmError for what the template refuses.
        """
        assert self._chat, "a chat template is applied by a model that was given one"
        options = {"reply": add_generation_prompt, "unfinished": not add_generation_prompt}
        try:
            return self._chat.render(chat_history, **options)
        except MegalmError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            if not self._left_out:
                logger.warning("the chat template refuses system messages: they are left out")
            self._left_out = True
            return self._chat.render(others, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that apply_chat_template follows, for the harness's records."""
        return self._chat.template if self._chat and chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which depend on it."""
        return self._text.fingerprint

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy choice says the same) of each (key, context, continuation), in order."""
        rows = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise MegalmError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model of "
                    f"{self.max_length} positions: leave the task out, or use a model of a longer context"
                )
            # of a context of spaces alone nothing is left: the harness moves them into the continuation
            kept = (*(context or [self.prefix_token_id]), *continuation)[-(self.max_length + 1) :]
            rows.append((kept[: -len(continuation)], tuple(continuation)))
        scores = self._shared(
            rows,
            lambda row: len(row[0]) + len(row[1]),
            lambda batch: [(each.loglikelihood, each.greedy) for each in score(self._model, batch)],
            "scoring",
            disable_tqdm,
        )
        for request, result in zip(requests, scores):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], result)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows that each score as many ids as the model has positions."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in map(make_disjoint_window, rolling):
                windows.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (loglikelihood, _) in zip(owners, scores, strict=True):
            totals[owner] += loglikelihood
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each (context, options), up to the first of the options' `until`.

        Raises MegalmError for an option that megalm's sampling does not have.
        """
        rows = []
        for request in requests:
            context, options = request.args
            rows.append((tuple(self.tok_encode(context)) or (self.prefix_token_id,), json.dumps(options)))
        texts: list[str] = [""] * len(rows)
        for wanted in sorted({options for _, options in rows}):
            chosen = [number for number, (_, options) in enumerate(rows) if options == wanted]
            same = self._generated([rows[number][0] for number in chosen], json.loads(wanted), disable_tqdm)
            for number, text in zip(chosen, same, strict=True):
                texts[number] = text
        for request, text in zip(requests, texts):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _generated(self, prompts: list[tuple[int, ...]], options: dict[str, Any], quiet: bool) -> list[str]:
        options = dict(normalize_gen_kwargs(options, self._max_new_tokens))
        most, stop, sampled = options.pop("max_gen_toks"), options.pop("until"), options.pop("do_sample", False)
        if unknown := sorted(options.keys() - set(SAMPLING)):
            raise MegalmError(
                f"the task generates with {unknown[0]}, which megalm's sampling does not have: take it out of its "
                f"generation_kwargs, or use {', '.join(SAMPLING)}"
            )
        room = self.max_length - most
        if room < 1:
            raise MegalmError(
                f"the task generates {most} tokens and the model has {self.max_length} positions: set max_gen_toks in "
                "its generation_kwargs"
            )
        if not sampled:
            options["temperature"] = 0.0
        # control tokens never come out as text, which may be searched for others
        controls = self._text.special_tokens
        ends = {controls[each] for each in stop if each in controls} | (self._chat.ends if self._chat else set())
        sampling = Sampling(**options)

        def run(batch: Sequence[tuple[tuple[int, ...], int]]) -> list[str]:
            pieces = generate(
                self._model,
                self._config,
                self._text,
                [prompt for prompt, _ in batch],
                max_new_tokens=most,
                sampling=sampling,
                stop=stop,
                ends=ends,
                seed=[seed for _, seed in batch],
            )
            return collect(pieces, len(batch))

        # the same question several times (repeats) is to have several answers, whatever the batches
        items = [(prompt[-room:], self._seed + number if sampled else 0) for number, prompt in enumerate(prompts)]
        return self._shared(items, lambda item: len(item[0]), run, "generating", quiet)

    def _shared(
        self, items: Sequence[T], length: Callable[[T], int], run: Callable[[list[T]], list[R]], what: str, quiet: bool
    ) -> list[R]:
        """run() over all items in batches of like length, the longest first, each by one data-parallel rank.

        Items that are equal are run once. Results are in the order of items, on every rank.
        """
        ordered = sorted(dict.fromkeys(items), key=length, reverse=True)
        ranks = self._ranks
        batches = [ordered[start : start + self._batch_size] for start in range(0, len(ordered), self._batch_size)]
        found: dict[T, R] = {}
        progress = tqdm(total=len(ordered), desc=what, unit="rows", disable=quiet or ranks.rank > 0 or None)
        for number, batch in enumerate(batches):
            if number % ranks.data_size == ranks.data_rank:
                found |= zip(batch, run(batch), strict=True)
            progress.update(len(batch))
        progress.close()
        everyone: dict[T, R] = {}
        for part in ranks.gather(found):
            everyone |= part
        return [everyone[item] for item in items]


class Copies(LM):
    """A model of the harness that every rank has a copy of: each answers its share of the requests.

    The harness could share out the documents instead, but then needs as many of each task as there are ranks, answers
    some twice, and returns them in another order.
    """

    def __init__(self, model: LM, ranks: Ranks) -> None:
        super().__init__()
        self._model = model
        self._ranks = ranks

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self._shared("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._shared("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self._shared("generate_until", requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._model.apply_chat_template(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._model.chat_template(chat_template)

    @property
    def tokenizer_name(self) -> str:
        return self._model.tokenizer_name

    def _shared(self, what: str, requests: list[Instance]) -> list[Any]:
        rank, size = self._ranks.data_rank, self._ranks.data_size
        # neighbours are the choices of one question: they stay together, and their context is read once
        start, stop = len(requests) * rank // size, len(requests) * (rank + 1) // size
        mine = getattr(self._model, what)(requests[start:stop]) if stop > start else []
        return [answer for part in self._ranks.gather(mine) for answer in part]


def run_tasks(
    model: LM,
    tasks: Sequence[str],
    *,
    include: Sequence[Path] = (),
    data: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    multiturn: bool = True,
) -> dict[str, Any] | None:
    """The harness's results of tasks: names that it or a folder of `include` knows, or task files (.yaml).

    data: the folder that paths in task files and the Hub's names of datasets are relative to; by default the current
    one. shots: examples before each question, where not as the task says. limit: documents of each task, its first
    ones. bootstrap: draws for the standard error of what is no mean, such as perplexity. chat: questions are
    written as the model's chat template says. system: what stands before each. multiturn: in a chat, examples are turns
    of their own, not text before the question. Every rank calls it; ranks that are not the first of their machine get
    None.

    Raises MegalmError for a task that is not known or whose data cannot be read.
    """
    named = [str(Path(task).resolve()) if task.endswith((".yaml", ".yml")) else task for task in tasks]
    folders = [folder.resolve() for folder in include]
    with chdir(data or Path.cwd()):
        manager, ready = load_tasks(named, folders)
        return simple_evaluate(
            model=model,
            tasks=ready,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=bootstrap,
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            apply_chat_template=chat,
            system_instruction=system,
            fewshot_as_multiturn=multiturn,
        )


def report(found: dict[str, Any], about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What to keep of the harness's results, with `about` (the checkpoint and how it was read); and their table.

    A task's hash is over its documents, prompts and targets: results with equal hashes answer the same questions.
    """
    hashes = {
        task: hash_string("".join(each["doc_hash"] + each["prompt_hash"] + each["target_hash"] for each in samples))
        for task, samples in found["samples"].items()
    }
    groups = found.get("groups") or {}
    members = found.get("group_subtasks") or {}
    for group in groups:
        hashes[group] = hash_string("".join(hashes[task] for task in _leaves(group, members) if task in hashes))
    kept = {
        **about,
        "harness": {"name": "lm-evaluation-harness", "version": version("lm_eval")},
        "results": found["results"],
        "groups": groups,
        "task_hashes": hashes,
        "task_versions": found["versions"],
        "shots": found["n-shot"],
        "documents": found["n-samples"],
        "higher_is_better": found["higher_is_better"],
    }
    fingerprint = about["checkpoint"]["fingerprint"]
    lines = [
        _table(found, hashes),
        f"checkpoint {about['checkpoint']['path']}, fingerprint {fingerprint[:8]}; lm-evaluation-harness "
        f"{kept['harness']['version']}",
    ]
    return json.loads(json.dumps(kept, default=str)), "\n".join(lines)


def _leaves(name: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, or of a group in it, by name; of a task, itself."""
    return sorted(leaf for each in members[name] for leaf in _leaves(each, members)) if members.get(name) else [name]


def _table(found: dict[str, Any], hashes: dict[str, str]) -> str:
    """A row per task and metric, with the beginning of its hash; groups, which are means over tasks, come last."""
    rows = [["task", "shots", "metric", "", "value", "standard error", "questions"]]
    groups = found.get("groups") or {}
    for task, metrics in [*(each for each in found["results"].items() if each[0] not in groups), *groups.items()]:
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            higher = found["higher_is_better"].get(task, {}).get(metric)
            rows.append(
                [
                    task,
                    str(found["n-shot"].get(task, "")),
                    metric if filtered == "none" else f"{metric} ({filtered})",
                    {True: "↑", False: "↓"}.get(higher, ""),
                    f"{value:.4f}" if isinstance(value, float) else str(value),
                    f"{error:.4f}" if isinstance(error, float) else "-",
                    hashes.get(task, "-")[:8],
                ]
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    words = [
        [
            text.rjust(width) if 3 < place < 6 else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in words)
