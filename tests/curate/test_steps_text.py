"""Extraction, encodings, languages, lists, samples, decontamination and the quality classifier."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalm.curate.document import Document, Rejection
from megalm.curate.recipe import step_class
from megalm.curate.step import Merging, Step
from megalm.curate.steps.compiled import compiled
from megalm.curate.steps.lists import host_of
from megalm.curate.steps.quality_classifier import HashedNgrams, train
from megalm.curate.steps.registry import KINDS
from megalm.errors import MegalmError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PARAGRAPHS = [
    "The river that runs through the valley was once the border of two small states, and people lived on both sides.",
    "In the middle of the last century a dam was built, which gave the towns light but took the best fields of all.",
    "Today there is talk of removing it, and the council will vote on the question in the spring after a hearing.",
]
CHINESE = [
    "这条河流穿过山谷，曾经是两个小国的边界。自青铜时代以来，人们就在河的两岸居住，并且彼此交换食盐。",
    "上个世纪中叶，这里修建了一座大坝，它给城镇带来了光明，却也夺走了农民最好的土地，许多人因此离开了家乡。",
    "今天，有人在讨论是否应该把它拆除。议会将在明年春天的公开听证会之后，就这个问题进行投票表决。",
]


def build(kind: str, **settings: Any) -> Step:
    cls = step_class(kind)
    return cls(cls.Settings.model_validate(settings))


def one(kind: str, document: Document, **settings: Any) -> str | None:
    (verdict,) = build(kind, **settings).apply([document])
    return verdict.reason if verdict else None


# HTML


def page(paragraphs: list[str], charset: str = "utf-8") -> str:
    menu = "".join(
        f'<li><a href="/{name}">{name}</a></li>' for name in ("Startpage", "Newsfeed", "Shopping", "Aboutus")
    )
    return (
        f"<html><head><meta charset={charset}><title>A dam</title><script>var x = 'scripted';</script></head><body>"
        f"<nav><ul>{menu}</ul></nav><article><h1>A dam</h1>{''.join(f'<p>{text}</p>' for text in paragraphs)}</article>"
        f"<footer><p>Copyright notice</p><ul>{menu}</ul></footer></body></html>"
    )


@pytest.mark.parametrize("mode", ["fast", "best"])
@pytest.mark.parametrize("paragraphs", [PARAGRAPHS, CHINESE], ids=["en", "zh"])
def test_the_article_is_extracted_and_the_menu_is_not(mode, paragraphs):
    document = Document("1", page(paragraphs))
    assert one("extract_html", document, mode=mode) is None
    assert all(text in document.text for text in paragraphs)
    assert not any(word in document.text for word in ("Newsfeed", "Copyright", "scripted", "<p>"))
    assert document.metadata["title"] == "A dam"


@pytest.mark.parametrize(
    "text,expected",
    [("plain words", "not HTML"), ("<html><body><script>x()</script></body></html>", "no text in the page"),
     ("<p>" + "x" * 2_000_000, "page too large")],
)  # fmt: skip
def test_pages_without_text_are_left_out(text, expected):
    document = Document("1", text, {"content_type": "text/html"})
    assert one("extract_html", document, max_megabytes=1.0) == expected


@pytest.mark.parametrize(
    "text,metadata",
    [
        ("if a < b and c > d: print('plain')\n\n<not a tag>", {}),
        ("In HTML, <b>bold</b> and <p> are tags.", {}),
        (page(PARAGRAPHS), {"content_type": "text/plain; charset=utf-8"}),
    ],
    ids=["text", "text about HTML", "a page's source"],
)
def test_plain_text_goes_on_as_it_is_unless_told(text, metadata):
    document = Document("1", text, metadata)
    assert one("extract_html", document) is None
    assert document.text == text
    assert one("extract_html", Document("1", text, metadata), plain_text="reject") == "plain text"


@pytest.mark.parametrize("after", ["# Title", "<p>text"])
def test_comments_before_the_text_are_read_once(after):
    """Badges of a README; told apart in every way, forty of them would take years."""
    document = Document("1", "<!-- badge -->\n" * 4000 + after, {})
    assert one("extract_html", document) is None
    assert ("badge" in document.text) == (after == "# Title")


def test_no_page_stops_a_task():
    draw = random.Random(0)
    raw = page(PARAGRAPHS)
    for _ in range(60):
        begin, end = sorted(draw.sample(range(len(raw)), 2))
        broken = draw.choice([raw[begin:end], raw[:begin] + "\x00<<p " + raw[end:], "<a>" * 3000 + raw[begin:]])
        one("extract_html", Document("1", broken), mode=draw.choice(["fast", "best"]))


# Unicode


@pytest.mark.parametrize(
    "broken,whole",
    [
        ("donâ€™t", "don’t"), ("Ã¼ber", "über"), ("fish &amp; chips", "fish & chips"), ("a\x00b\x08c", "abc"),
        ("\ufeffbegin", "begin"), ("one\r\ntwo", "one\ntwo"), ("cafe\u0301", "café"), ("\ud83d\ude00", "😀"),
    ],
)  # fmt: skip
def test_broken_text_is_repaired(broken, whole):
    document = Document("1", broken)
    assert one("repair_unicode", document) is None
    assert document.text == whole


@pytest.mark.parametrize(
    "text",
    [
        *PARAGRAPHS,
        *CHINESE,
        "x² + ½ ﬁne ① ㎏ ＡＢＣ１２３：，“quoted” ‘so’",
        "naïve Ångström Ça va à Paris — “été”",
        "a < b & c > d",
        "ﾊﾝｶｸ",
    ],
)
def test_sound_text_stays_as_it_is(text):
    document = Document("1", text)
    assert one("repair_unicode", document) is None
    assert document.text == text


def test_text_with_too_many_losses_is_left_out():
    assert one("repair_unicode", Document("1", "lost \ufffd\ufffd\ufffd words here")) == "characters lost"
    assert one("repair_unicode", Document("1", "lost \ufffd word"), max_lost=0.2) is None


# Languages


def test_languages_are_recognised_offline():
    texts = {
        "en": PARAGRAPHS[0], "zh": CHINESE[0], "de": "Der Fluss war einst die Grenze zwischen zwei kleinen Staaten.",
        "fr": "La rivière qui traverse la vallée était autrefois la frontière de deux petits États.",
        "ja": "川は谷を流れ、かつては二つの小さな国の国境でした。",
        "ko": "강은 계곡을 흐르며 한때 두 작은 나라의 국경이었습니다.",
    }  # fmt: skip
    documents = [Document(name, text) for name, text in texts.items()]
    verdicts = build("language", keep=["en", "zh"]).apply(documents)
    assert [document.metadata["language"] for document in documents] == list(texts)
    assert [verdict.reason if verdict else None for verdict in verdicts] == [
        None,
        None,
        *(f"language {n}" for n in ("de", "fr", "ja", "ko")),
    ]
    assert all(document.metadata["language_score"] > 0.5 for document in documents)


def test_classical_chinese_is_chinese():
    """lid.176 alone takes this for Japanese."""
    document = Document(
        "1", "宛轉行\n張籍\n華屋重翠幄，綺席雕象牀。\n遠漏微更疎，薄衾中夜涼。\n爐氣暗裴徊，寒燈背斜光。"
    )
    assert one("language", document, keep=["zh"]) is None


def test_text_without_letters_has_no_language():
    assert one("language", Document("1", "123 456 !!!")) == "no letters"
    assert one("language", Document("1", "123 456 !!!"), without_text=True) is None
    assert one("language", Document("1", "xq zzkw vvt"), min_score=0.9) == "language uncertain"


def test_traditional_becomes_simplified_by_words():
    document = Document("1", "乾隆皇帝的頭髮與乾燥的軟體")
    one("simplify_chinese", document)
    assert document.text == "乾隆皇帝的头发与干燥的软体"
    document = Document("1", "軟體與網路")
    one("simplify_chinese", document, words="mainland")
    assert document.text == "软件与网络"
    japanese = "この國の歷史は長いです。"
    document = Document("1", japanese)
    one("simplify_chinese", document)
    assert document.text == japanese


# Lists and samples


def test_domains(tmp_path):
    (tmp_path / "hosts").write_text("# adult\n0.0.0.0 bad.example # remark\nworse.example\n\n")
    settings = {"block": ["*.spam.com"], "block_files": [str(tmp_path / "hosts")], "block_words": ["casino"]}
    urls = {
        "https://spam.com/x": "blocked domain", "http://www.a.spam.com:8080/x": "blocked domain",
        "https://notspam.com/": None, "//bad.example": "blocked domain", "worse.example/page": "blocked domain",
        "https://ok.com/online-casino/1": "blocked word in the address", "https://ok.com/casinos": None, "": None,
    }  # fmt: skip
    for url, expected in urls.items():
        assert one("domains", Document("1", "x", {"url": url}), **settings) == expected, url
    assert one("domains", Document("1", "x", {"url": "https://b.org"}), allow=["a.org"]) == "domain not on the list"
    assert one("domains", Document("1", "x", {"url": "https://x.a.org"}), allow=["a.org"]) is None
    assert one("domains", Document("1", "x"), without_url=False) == "no address"
    assert host_of("http://[::1") == ""
    with pytest.raises(MegalmError, match="name a text file"):
        one("domains", Document("1", "x", {"url": "https://b.org"}), block_files=[str(tmp_path / "none")])


def test_licences():
    settings = {"allow": ["MIT", "apache-2.0", "CC-BY-*", "CC0-1.0"], "block": ["CC-BY-NC-*"]}
    cases: list[tuple[Any, str | None]] = [
        ("mit", None), ("Apache-2.0", None), ("GPL-3.0-only", "licence not on the list"), (None, "no licence known"),
        ("https://creativecommons.org/licenses/by/4.0/", None), (["GPL-3.0-only", "MIT"], None),
        ([], "no licence known"),         ("https://creativecommons.org/licenses/by-nc/4.0/", "blocked licence"),
        (["MIT", "CC-BY-NC-4.0"], "blocked licence"),
        ("http://creativecommons.org/publicdomain/zero/1.0/", None),
    ]  # fmt: skip
    for licence, expected in cases:
        assert one("licences", Document("1", "x", {"license": licence}), **settings) == expected, licence


def test_a_sample_is_the_same_in_every_run_and_grows_with_its_share():
    documents = [Document(f"file-{number}", "x") for number in range(4000)]
    kept = [
        {d.id for d, verdict in zip(documents, build("sample", share=share, seed=seed).apply(documents)) if not verdict}
        for share, seed in ((0.2, 0), (0.2, 0), (0.5, 0), (0.2, 1))
    ]
    assert kept[0] == kept[1] < kept[2]
    assert abs(len(kept[0]) - 800) < 80
    assert abs(len(kept[0] & kept[3]) - 160) < 50, "another seed draws independently"


# Decontamination


def evaluation(folder: Path) -> str:
    path = folder / "eval.jsonl"
    rows = [
        {"question": "If a train leaves the station at noon and travels at sixty miles an hour, when does it arrive?",
         "choices": ["at two in the afternoon of the same day", "never"]},
        {"question": "光合作用是植物利用太阳的能量把二氧化碳和水变成有机物的过程，对吗？", "choices": ["对", "错"]},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_documents_with_questions_are_left_out_with_what_they_share(tmp_path):
    step = build("decontaminate", evaluations=[evaluation(tmp_path)])
    documents = [
        Document(
            "asks", "Quiz: if a TRAIN leaves the station - at noon and travels at sixty miles an hour! Answers below."
        ),
        Document("twelve", "A train leaves the station at noon and travels at sixty miles, said he."),
        Document("whole", "We met at two in the afternoon of the same day, and never again."),
        Document("zh", "老师问：光合作用是植物利用太阳的能量把二氧化碳和水变成什么？"),
        Document("zh words", "光合作用是植物利用太阳的能量把二氧化碳变成有机物。"),
        Document("clean", " ".join(PARAGRAPHS + CHINESE)),
        Document("empty", ""),
    ]
    verdicts = step.apply(documents)
    assert [verdict is not None for verdict in verdicts] == [True, False, True, True, False, False, False]
    assert verdicts[0] is not None and verdicts[0].reason == "in the evaluation set eval.jsonl"
    assert verdicts[0].detail.startswith(
        "line 1, 3 overlaps: if a train leaves the station - at noon and travels at sixty"
    )
    assert verdicts[3] is not None and verdicts[3].detail.startswith("line 2, ")
    assert documents[0].metadata["overlaps"] == {str(tmp_path / "eval.jsonl"): 3}
    assert step.report() == {str(tmp_path / "eval.jsonl"): {"texts": 6, "too short": 3, "sequences": 7 + 1 + 11}}


def test_decontamination_agrees_with_sets_of_words(tmp_path):
    draw = random.Random(0)
    words = [f"w{number}" for number in range(40)]
    questions = [draw.choices(words, k=30) for _ in range(20)]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps({"q": " ".join(question)}) + "\n" for question in questions))
    known = {tuple(question[i : i + 13]) for question in questions for i in range(18)}
    documents, expected = [], []
    for number in range(200):
        question, begin = draw.choice(questions), draw.randrange(18)
        text = draw.choices(words, k=20) + question[begin : begin + draw.randrange(9, 17)] + draw.choices(words, k=20)
        documents.append(Document(str(number), " ".join(text)))
        expected.append(any(tuple(text[i : i + 13]) in known for i in range(len(text) - 12)))
    verdicts = build("decontaminate", evaluations=[str(path)]).apply(documents)
    assert [verdict is not None for verdict in verdicts] == expected
    assert 20 < sum(expected) < 180


def test_an_evaluation_set_that_cannot_be_read_is_an_error_not_an_empty_one(tmp_path):
    path = tmp_path / "eval.jsonl"
    for text, settings, expected in (
        ('{"q": "short"}\n', {}, "no text in .* has 8 words"),
        ('{"q": "x"}\n', {"fields": ["question"]}, r"eval.jsonl:1 has no field 'question': it has q"),
        ("{\n", {}, r"eval.jsonl:1 is not JSON"),
    ):
        path.write_text(text)
        with pytest.raises(MegalmError, match=expected):
            one("decontaminate", Document("1", "x"), evaluations=[str(path)], **settings)
    with pytest.raises(MegalmError, match="cannot be read"):
        one("decontaminate", Document("1", "x"), evaluations=[str(tmp_path / "none.jsonl")])


# The quality classifier


def sentence(text: str) -> list[str]:
    return text.split()


def examples(draw: random.Random, good: bool, count: int) -> list[str]:
    """Sentences whose words both kinds share, but for their shares."""
    plain = sentence("the of and to in that it is was for on are with as they at be this have from")
    technical = sentence("theorem energy species river century method theory evidence structure language")
    commercial = sentence("buy cheap click free offer now best deal price subscribe")
    rich = technical if good else commercial
    return [" ".join(draw.choice(rich if draw.random() < 0.15 else plain) for _ in range(80)) for _ in range(count)]


def test_a_trained_classifier_tells_good_from_bad_and_is_the_same_after_saving(tmp_path):
    draw = random.Random(0)
    model, told = train(examples(draw, True, 150), examples(draw, False, 300), bits=14)
    assert told["auc"] > 0.99 and told["accuracy"] > 0.95
    model.save(tmp_path / "model.npz")
    good, bad = examples(draw, True, 50), examples(draw, False, 50)
    documents = [Document(str(number), text) for number, text in enumerate([*good, *bad])]
    verdicts = build("quality_classifier", model=str(tmp_path / "model.npz")).apply(documents)
    assert sum(verdict is None for verdict in verdicts[:50]) >= 48
    assert sum(verdict is not None for verdict in verdicts[50:]) >= 48
    for document, score in zip(documents, model.scores([*good, *bad])):
        assert abs(document.metadata["quality_score"] - score) < 0.01
    step = build("quality_classifier", model=str(tmp_path / "model.npz"), action="score", name="edu", buckets=[0.5])
    assert step.apply(documents) == [None] * 100
    assert [document.metadata["edu_bucket"] for document in documents].count(1) in range(48, 53)
    assert step.measure(documents[0]).keys() == {"edu score"}


def test_the_tool_trains_a_model(tmp_path):
    draw = random.Random(0)
    for name, good in (("good", True), ("bad", False)):
        rows = examples(draw, good, 60)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    command = [sys.executable, "tools/train_quality_classifier.py", "--positive", tmp_path / "good.jsonl", "--negative",
               tmp_path / "bad.jsonl", "--output", tmp_path / "models" / "model.npz", "--bits", "12"]  # fmt: skip
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(list(map(str, command)), cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["model.npz"]
    assert "auc 1" in done.stdout or "auc 0.9" in done.stdout
    assert len(HashedNgrams.load(tmp_path / "models" / "model.npz").weights) == 4096


def test_a_model_that_cannot_be_written_is_known_before_it_is_trained(tmp_path, monkeypatch):
    from tools import train_quality_classifier

    (tmp_path / "text.jsonl").write_text("")
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.setattr(train_quality_classifier, "train", lambda *_, **__: pytest.fail("it was trained"))
    for output, why in (("folder.npz", "Is a directory"), ("text.jsonl/model.npz", "File exists: .*text.jsonl")):
        options = {"--positive": "text.jsonl", "--negative": "text.jsonl", "--output": output}
        words = [word for option, name in options.items() for word in (option, str(tmp_path / name))]
        monkeypatch.setattr(sys, "argv", ["train_quality_classifier.py", *words])
        with pytest.raises(MegalmError, match=rf"cannot write .*{output} \({why}\): make room for it, or name another"):
            train_quality_classifier.main()
    with pytest.raises(OSError):
        HashedNgrams(np.zeros(2, np.float32), 0.0, 1, 1).save(tmp_path / "folder.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder.npz", "text.jsonl"]


def test_a_classifier_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.npz").write_text("not a model")
    for name in ("model.npz", "none.npz"):
        with pytest.raises(MegalmError, match="cannot be read"):
            one("quality_classifier", Document("1", "x"), model=str(tmp_path / name))
    with pytest.raises(MegalmError, match="give some of both"):
        train(["good text"] * 20, [], bits=10)


ODD = [
    "", " ", "\n\n\n", "\x00", "\ud800", "a\udc80b", "x" * 50_000, "的" * 20_000, "。" * 300, "1" * 3000, "- \n" * 500,
    "\u200b\u2028\u202e", "İ" * 100, "e\u0301" * 100, "😀👨‍👩‍👧" * 50,
    "ة العربية" * 40, "<p>" * 100, "@" * 500, ":" * 500, "{" * 99,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_however_odd_stops_a_step(kind, tmp_path, request):
    """Every verdict is one of the two kinds, a rejection has a reason, and what goes on is still text."""
    settings: dict[str, Any] = {}
    if kind == "decontaminate":
        settings = {"evaluations": [evaluation(tmp_path)]}
    elif kind == "quality_classifier":
        HashedNgrams(np.zeros(1024, dtype=np.float32), 0.1, 2, 100).save(tmp_path / "model.npz")
        settings = {"model": str(tmp_path / "model.npz")}
    elif kind == "perplexity":
        model = request.getfixturevalue("perplexity_model") / "model"
        settings = {"models": {"en": {"path": str(model), "buckets": [100]}}}
    elif kind == "sample":
        settings = {"share": 0.5}
    step = build(kind, **settings)
    step.prepare()
    documents = [Document(f"odd-{number}\ud800", text, {"language": "en"}) for number, text in enumerate(ODD)]
    if isinstance(step, Merging):
        (tmp_path / "sketch").write_bytes(step.sketch(documents))
        step.merge([tmp_path / "sketch"], tmp_path / "verdicts")
        step.judge(tmp_path / "verdicts")
    verdicts = step.apply(documents)
    assert len(verdicts) == len(documents)
    for document, verdict in zip(documents, verdicts):
        assert verdict is None or (isinstance(verdict, Rejection) and verdict.reason)
        assert isinstance(document.text, str)
        measured = step.measure(document)
        assert all(isinstance(value, float | int) and value == value for value in measured.values())
    assert step.apply([]) == []


def test_loops_compile_where_nothing_can_be_kept(monkeypatch):
    def refuse(cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda loop: loop

    monkeypatch.setattr("numba.njit", refuse)
    assert compiled(len)("abc") == 3


def test_the_list_of_steps_costs_nothing():
    code = "import sys; import megalm.curate.steps.registry as s\n"
    code += "assert not {'numba', 'numpy', 'ftfy'} & set(sys.modules); print(len(s.KINDS))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(KINDS)
