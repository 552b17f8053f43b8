"""Every task on real data, from one command each, beside what anyone would try first on the same rows.

    python benchmarks/task_scores.py --data DIR [--start RUN] [--only translation ...] [--steps N]

DIR holds thucnews_titles.tsv and thucnews_labels.txt, wnut17_{train,dev}.conll, semeval2010_task8_train.txt,
cmrc2018_trial.json, multi30k_train.{en,de}.gz, alpaca_zh_demo.json and tang_poems.jsonl, as they are published;
summaries are made of the Python installation's own documentation. Models start from --start, a run whose tokenizer and
size they take, or from random weights (configs/model/1m.yaml) with a tokenizer trained on the task's rows. The configs
are configs/run/task_*.yaml.
"""

import argparse
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml
from classifier_baselines import regression, vectors

from megalm.data.python_corpus import docstrings
from megalm.errors import MegalmError, main_guard
from megalm.metrics.records import evaluated, read_records
from megalm.sft import formats, metrics
from megalm.tokenizer.train import train as train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """rows: of a folder with the data, and those that are held out if the publisher chose them. baseline: its name, and
    its score by `metric` from rows to train on and rows held out."""

    rows: Callable[[Path], tuple[list[Row], list[Row] | None]]
    metric: str
    baseline: str
    score: Callable[[list[Row], list[Row]], float]
    settings: tuple[str, ...] = ()
    vocab_size: int = 4096


# --- Rows ------------------------------------------------------------------------------------------------------------


def headlines(data: Path) -> tuple[list[Row], None]:
    names = (data / "thucnews_labels.txt").read_text(encoding="utf-8").split()
    return list(formats.tsv([data / "thucnews_titles.tsv"], names=names)), None


def captions(data: Path) -> list[Row]:
    return list(formats.parallel([data / "multi30k_train.en.gz", data / "multi30k_train.de.gz"]))


def pairs(data: Path) -> tuple[list[Row], None]:
    """Is the second the translation of the first? Half of them are another caption's."""
    rows = captions(data)[:12000]
    draw = random.Random(0)
    others = [row["target"] for row in rows]
    draw.shuffle(others)
    made = []
    for row, other in zip(rows, others, strict=True):
        right = draw.random() < 0.5
        second = row["target"] if right else other
        made.append({"sentence1": row["source"], "sentence2": second, "label": "yes" if right else "no"})
    return made, None


def named(data: Path) -> tuple[list[Row], list[Row]]:
    train, dev = (list(formats.conll([data / f"wnut17_{part}.conll"])) for part in ("train", "dev"))
    return train, dev


def relations(data: Path) -> tuple[list[Row], None]:
    return list(formats.semeval([data / "semeval2010_task8_train.txt"])), None


def questions(data: Path) -> tuple[list[Row], None]:
    return list(formats.squad([data / "cmrc2018_trial.json"])), None


def translations(data: Path) -> tuple[list[Row], None]:
    return captions(data), None


def summaries(data: Path) -> tuple[list[Row], None]:
    """What a module, class or function is for, and the rest of what its documentation says of it."""
    made = {}
    for _, _, text in docstrings():
        first, _, rest = text.strip().partition("\n\n")
        if 20 < len(first) < 160 and len(rest) > 80:
            made[" ".join(rest.split())] = " ".join(first.split())
    return [{"document": rest, "summary": first} for rest, first in made.items()], None


def talks(data: Path) -> tuple[list[Row], None]:
    found = json.loads((data / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    return [
        {"turns": [f"{row['instruction']}\n{row.get('input', '')}".strip(), row["output"]]}
        for row in found
        if row["output"].strip()
    ], None


def poems(data: Path) -> tuple[list[Row], None]:
    path = next(
        path for path in (data / "tang_poems.jsonl", data.parent / "pretrain" / "tang_poems.jsonl") if path.exists()
    )
    return [{"text": row["text"]} for row in formats.rows([path])], None


# --- What anyone would try first -------------------------------------------------------------------------------------


def bag_of_words(text: Callable[[Row], str], metric: str = "accuracy") -> Callable[[list[Row], list[Row]], float]:
    """Logistic regression on words and pairs of words."""

    def score(train: list[Row], held_out: list[Row]) -> float:
        model = regression([text(row) for row in train], [row["label"] for row in train])
        said = [str(label) for label in model.predict([text(row) for row in held_out])]
        references = [row["label"] for row in held_out]
        return metrics.classification(references, said, sorted({row["label"] for row in [*train, *held_out]}))[metric]

    return score


def remembered_tags(train: list[Row], held_out: list[Row]) -> float:
    """Each word has the tag that it had most often."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in train:
        for word, tag in zip(row["tokens"], row["tags"], strict=True):
            counts[word][tag] += 1
    usual = {word: seen.most_common(1)[0][0] for word, seen in counts.items()}
    said = [[usual.get(word, "O") for word in row["tokens"]] for row in held_out]
    return metrics.entities([row["tags"] for row in held_out], said)["f1"]


def nearest_sentence(train: list[Row], held_out: list[Row]) -> float:
    """The sentence of the context that shares most characters with the question."""
    said = []
    for row in held_out:
        asked = set(row["question"])
        said.append(max(re.split("[。！？，；]", row["context"]), key=lambda part: len(asked & set(part))))
    return metrics.span_answers([row["answers"]["text"] for row in held_out], said)["f1"]


def nearest_row(
    asked: Callable[[Row], str], answer: Callable[[Row], str], metric: str
) -> Callable[[list[Row], list[Row]], float]:
    """The answer of the training row whose question is most alike."""

    def score(train: list[Row], held_out: list[Row]) -> float:
        model = vectors([asked(row) for row in train])
        known = model.fit_transform([asked(row) for row in train])
        best = np.asarray((model.transform([asked(row) for row in held_out]) @ known.T).argmax(axis=1)).ravel()
        said = [answer(train[int(place)]) for place in best]
        return metrics.bleu_chrf([answer(row) for row in held_out], said)[metric]

    return score


def first_sentence(train: list[Row], held_out: list[Row]) -> float:
    said = [re.split(r"(?<=[.!?:]) ", row["document"])[0][:160] for row in held_out]
    return metrics.rouge([row["summary"] for row in held_out], said)["rougeL"]


def pairs_of_characters(train: list[Row], held_out: list[Row]) -> float:
    """Bits per byte of a bigram model of characters, with unseen pairs by their second character (Witten and Bell)."""
    ones, twos, followers = Counter[str](), Counter[tuple[str, str]](), defaultdict[str, set[str]](set)
    for row in train:
        text = f"\n{row['text']}\n"
        ones.update(text[1:])
        for pair in zip(text, text[1:]):
            twos[pair] += 1
            followers[pair[0]].add(pair[1])
    begun = Counter[str]()
    for (first, _), count in twos.items():
        begun[first] += count
    total, kinds = sum(ones.values()), len(ones) + 1
    bits, size = 0.0, 0
    for row in held_out:
        text = f"\n{row['text']}\n"
        for first, second in zip(text, text[1:]):
            alone = (ones[second] + 1) / (total + kinds)
            new = len(followers[first])
            likely = (twos[first, second] + new * alone) / (begun[first] + new) if begun[first] else alone
            bits -= math.log2(likely)
        size += len(row["text"].encode())
    return bits / size


# --- The tasks -------------------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, Experiment] = {
    "text_classification": Experiment(
        headlines, "accuracy", "bag of words", bag_of_words(lambda row: row["text"]), ("train.sequence_length=64",)
    ),
    "pair_classification": Experiment(
        pairs, "accuracy", "bag of words", bag_of_words(lambda row: f"{row['sentence1']} {row['sentence2']}")
    ),
    "token_classification": Experiment(named, "f1", "a word's usual tag", remembered_tags),
    "relation_extraction": Experiment(
        relations, "macro_f1", "bag of words", bag_of_words(lambda row: row["text"], "macro_f1")
    ),
    "question_answering": Experiment(
        questions, "f1", "nearest sentence", nearest_sentence, ("train.sequence_length=512",)
    ),
    "summarization": Experiment(summaries, "rougeL", "first sentence", first_sentence),
    "translation": Experiment(
        translations, "chrf", "nearest row", nearest_row(lambda row: row["source"], lambda row: row["target"], "chrf")
    ),
    "dialogue": Experiment(
        talks,
        "chrf",
        "nearest row",
        nearest_row(lambda row: row["turns"][0], lambda row: row["turns"][1], "chrf"),
        ("train.sequence_length=512",),
    ),
    "continuation": Experiment(
        poems,
        "bits_per_byte",
        "pairs of characters",
        pairs_of_characters,
        vocab_size=8192,  # classical Chinese
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--start", type=Path, metavar="RUN", help="start from this run (default: random weights)")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), metavar="TASK")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of training (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=100, metavar="N", help="rows that are scored")
    given = parser.parse_args()
    print(f"{'task':22}{'rows':>8}  {'metric':14}{'megalm':>8}{'baseline':>10}  which{'':17}{'seconds':>8}")
    for name in given.only:
        experiment = EXPERIMENTS[name]
        with tempfile.TemporaryDirectory() as folder:
            train, held_out = experiment.rows(given.data)
            if held_out is None:
                chosen = [formats.is_held_out(row, 0.1) for row in train]
                train, held_out = (
                    [row for row, out in zip(train, chosen, strict=True) if out == part] for part in (False, True)
                )
            started = time.perf_counter()
            found = megalm(name, experiment, train, held_out, Path(folder), given)
            seconds = time.perf_counter() - started
            score = experiment.score(train, held_out)
            print(
                f"{name:22}{len(train):8,}  {experiment.metric:14}{found:8.3f}{score:10.3f}  "
                f"{experiment.baseline:22}{seconds:8.0f}",
                flush=True,
            )


def megalm(
    name: str, experiment: Experiment, train: list[Row], held_out: list[Row], folder: Path, given: argparse.Namespace
) -> float:
    """The score of a run of the task's config over these rows."""
    for part, rows in (("train", train), ("held_out", held_out)):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = [
        f"run.directory={folder / 'run'}",
        f"data.sources=[{{path: {folder / 'train.jsonl'}}}]",
        f"data.held_out=[{{path: {folder / 'held_out.jsonl'}}}]",
        f"train.steps={given.steps}",
        f"schedule.warmup_steps={min(20, given.steps)}",
        "evaluate.every=0",
        f"evaluate.sequences={given.sequences}",
        "logging.progress_bar=off",
        *experiment.settings,
    ]
    if given.start:
        config = yaml.safe_load((given.start / "config.yaml").read_text(encoding="utf-8"))
        settings.append(f"data.tokenizer={config['data']['tokenizer']}")
        kept = {key: value for key, value in config["model"].items() if value is not None and key != "init_from"}
        settings += [
            f"model.{key}={json.dumps(value)}" for key, value in kept.items() if key not in ("head", "num_labels")
        ]
        settings.append(f"model.init_from={given.start}")
    else:
        texts = list(strings(train))
        train_tokenizer(lambda: iter(texts), experiment.vocab_size).save(folder / "tokenizer")
        settings.append(f"data.tokenizer={folder / 'tokenizer'}")
    command = [sys.executable, str(REPOSITORY / "megalm" / "train.py")]
    command += ["--config", str(REPOSITORY / "configs" / "run" / f"task_{name}.yaml")]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
        raise MegalmError(f"the run of {name} failed ({last}): try its config by hand")
    said = evaluated(list(read_records(folder / "run" / "metrics.jsonl"))[-1])
    return next(iter(said[experiment.metric].values()))


def strings(value: Any) -> Iterable[str]:
    """Every text in rows."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


if __name__ == "__main__":
    main_guard(main)
