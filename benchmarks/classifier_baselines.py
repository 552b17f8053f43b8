"""A fine-tuned classifier beside what anyone would try first, on the same rows: a bag of words with logistic
regression, and Hugging Face's Trainer from the same weights.

    python benchmarks/classifier_baselines.py --run runs/demo-sft/classes

Trainer starts from the export of the model that the run started from (model.init_from), and takes the run's rows,
labels, number of steps, learning rate, schedule, weight decay and examples per step. Its head and its order of examples
are drawn by its own generator, so that scores agree within the noise that is printed beside them.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import yaml

from megalm.errors import MegalmError, main_guard
from megalm.metrics.records import Record, read_records
from megalm.sft.read import read_rows, row_files
from megalm.sft.task import Refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, metavar="RUN", help="a finished text_classification run")
    parser.add_argument("--skip-trainer", action="store_true", help="only the bag of words")
    given = parser.parse_args()
    config, records = read_run(given.run)
    train, held_out = (rows_of(config, part) for part in ("sources", "held_out"))
    labels = config["task"]["labels"] or sorted({label for _, label in train})
    truth = np.array([labels.index(label) for _, label in held_out])
    print(f"{len(train):,} rows to train on, {len(held_out):,} held out, {len(labels)} classes")
    found: dict[str, float | None] = {"always the largest class": most_common(train, labels, truth)}
    found["bag of words, logistic regression"] = bag_of_words(train, held_out, labels, truth)
    found["megalm"] = last_accuracy(records, given.run)
    if not given.skip_trainer:
        found["Hugging Face Trainer, same start"] = trainer(config, records, train, held_out, labels, truth)
    print(f"{'held-out accuracy':36}{'':>8}  +- standard error")
    for name, score in found.items():
        if score is not None:
            print(f"{name:36}{score:8.3f}  +- {math.sqrt(score * (1 - score) / len(truth)):.3f}")


def read_run(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """The run's config and its records."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        records = list(read_records(folder / "metrics.jsonl"))
    except OSError as error:
        raise MegalmError(f"{folder} is not the folder of a run ({error}): name one") from None
    if (config.get("task") or {}).get("kind") != "text_classification":
        raise MegalmError(f"{folder} is not a run of task.kind text_classification: name one")
    return config, records


def last_accuracy(records: list[Record], folder: Path) -> float:
    scored = [scores for record in records if (scores := record.get("scores"))]
    if not scored:
        raise MegalmError(f"{folder} was not scored yet: let it finish, with data.held_out")
    return next(iter(scored[-1].values()))["accuracy"]


def rows_of(config: dict[str, Any], part: str) -> list[tuple[str, str]]:
    """(text, label) of each row that is one."""
    columns = config["task"]["columns"]
    text, label = columns.get("text", "text"), columns.get("label", "label")
    files = [file for source in config["data"][part] for file in row_files(source["path"])]
    rows = [row for file in files for _, row in read_rows(file) if not isinstance(row, Refused)]
    return [(row[text], row[label]) for row in rows]


def most_common(train: list[tuple[str, str]], labels: list[str], truth: np.ndarray) -> float:
    counts = [sum(label == name for _, label in train) for name in labels]
    return float((truth == int(np.argmax(counts))).mean())


def vectors(texts: list[str]) -> Any:
    """Words and pairs of words; characters and pairs of characters for text without spaces."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    spaced = sum(text.count(" ") for text in texts) > 0.1 * sum(map(len, texts))
    return TfidfVectorizer(
        analyzer="word" if spaced else "char",
        ngram_range=(1, 2),
        sublinear_tf=True,
        token_pattern=r"(?u)\b\w+\b" if spaced else None,
    )


def regression(texts: list[str], labels: list[Any]) -> Any:
    """Logistic regression on a bag of words, fitted."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(vectors(texts), LogisticRegression(C=10.0, max_iter=2000)).fit(texts, labels)


def bag_of_words(
    train: list[tuple[str, str]], held_out: list[tuple[str, str]], labels: list[str], truth: np.ndarray
) -> float:
    model = regression([text for text, _ in train], [labels.index(label) for _, label in train])
    return float((model.predict([text for text, _ in held_out]) == truth).mean())


def trainer(
    config: dict[str, Any],
    records: list[Record],
    train: list[tuple[str, str]],
    held_out: list[tuple[str, str]],
    labels: list[str],
    truth: np.ndarray,
) -> float:
    """Hugging Face's Trainer from the model that the run started from."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from megalm.convert.conversion import to_hf

    with tempfile.TemporaryDirectory() as folder:
        start = Path(config["model"]["init_from"])
        if not (start / "config.json").exists():
            to_hf(start, Path(folder, "start"))
            start = Path(folder, "start")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        set_seed(config["run"]["seed"])
        model = AutoModelForSequenceClassification.from_pretrained(
            start, num_labels=len(labels), dtype=torch.float32, pad_token_id=pad
        )
        longest = config["train"]["sequence_length"]

        def encoded(rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
            return [
                {"input_ids": ids[:longest], "labels": labels.index(label)}
                for ids, (_, label) in zip(tokenizer([text for text, _ in rows])["input_ids"], rows, strict=True)
            ]

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            width = max(len(row["input_ids"]) for row in rows)
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
                mask[place, : len(row["input_ids"])] = 1
            return {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": torch.tensor([row["labels"] for row in rows]),
            }

        steps, optimizer, schedule = config["train"]["steps"], config["optimizer"], config["schedule"]
        # A classifier trains one position an example, and a row of a batch holds several examples.
        per_step = max(1, round(records[-1]["tokens"] / records[-1]["step"]))
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=per_step,
            per_device_eval_batch_size=64,
            learning_rate=optimizer["learning_rate"],
            weight_decay=optimizer["weight_decay"],
            adam_beta1=optimizer["beta1"],
            adam_beta2=optimizer["beta2"],
            max_grad_norm=optimizer["gradient_clipping"],
            lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant"}[schedule["kind"]],
            warmup_steps=schedule["warmup_steps"],
            bf16=config["train"]["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=not sys.stderr.isatty(),
            seed=config["run"]["seed"],
        )
        training = Trainer(model=model, args=arguments, train_dataset=encoded(train), data_collator=collate)
        training.train()
        predicted = training.predict(encoded(held_out)).predictions
    return float((np.asarray(predicted).argmax(-1) == truth).mean())


if __name__ == "__main__":
    main_guard(main)
