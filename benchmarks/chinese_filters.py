"""How much clean Chinese text the filters keep, and how much machine-made noise they remove.

Clean text is what you name: JSONL with a field `text` (or --field), or plain text whose documents blank lines part. The
noise is made here, in twelve ways: characters at random, encodings read wrongly, menus, key words, repeated
advertisements, cut-off headlines, tables of numbers, the characters of clean text in random order, and so on.

Asked: at least 95 % of the clean documents kept, at least 95 % of the noise removed. The steps run in the order of a
recipe, with their default thresholds: language (if it is installed), gopher_repetition, gopher_quality, fineweb.
"""

import argparse
import base64
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from megalm.curate.document import Document, Rejection
from megalm.curate.recipe import step_class
from megalm.errors import MegalmError, main_guard

ASKED = 0.95
STEPS = {"language": {"keep": ["zh"], "min_score": 0.3}, "gopher_repetition": {}, "gopher_quality": {}, "fineweb": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="clean text: .jsonl, or .txt")
    parser.add_argument("--field", default="text", help="of a line of JSONL (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=600, help="of each file, and of noise (default: %(default)s)")
    parser.add_argument("--min-characters", type=int, default=24, help="of clean documents (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="print N wrongly judged documents of each kind"
    )
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    clean: dict[str, list[str]] = {}
    for path in arguments.data:
        texts = [text for text in read(Path(path), arguments.field) if len(text) >= arguments.min_characters]
        if not texts:
            raise MegalmError(f"{path} has no text of {arguments.min_characters} characters: lower --min-characters")
        clean[path] = draw.sample(texts, min(len(texts), arguments.documents))

    good = True
    for path, texts in clean.items():
        reasons = judge(texts)
        kept = reasons[None] / len(texts)
        good &= kept >= ASKED
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common() if reason)
        print(f"clean  {Path(path).name:28} {len(texts):5} documents, kept {kept:6.1%}   {told}")
        show(texts, lambda answer: answer is not None, arguments.show)
    every = [text for texts in clean.values() for text in texts]
    removed = total = 0
    for name, make in NOISE.items():
        texts = [make(draw, every) for _ in range(arguments.documents // len(NOISE))]
        reasons = judge(texts)
        gone = len(texts) - reasons[None]
        removed, total = removed + gone, total + len(texts)
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common() if reason)
        print(f"noise  {name:28} {len(texts):5} documents, removed {gone / len(texts):6.1%}   {told}")
        show(texts, lambda answer: answer is None, arguments.show)
    print(f"noise removed in all: {removed / total:.1%}")
    return 0 if good and removed / total >= ASKED else 1


def read(path: Path, field: str) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (json.loads(line)[field].strip() for line in text.split("\n") if line.strip())
    else:
        yield from (part.strip() for part in text.split("\n\n") if part.strip())


def answers(texts: list[str]) -> list[Rejection | None]:
    """The first step's verdict that is not None."""
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    verdicts: list[Rejection | None] = [None] * len(texts)
    for kind, settings in STEPS.items():
        cls = step_class(kind)
        for number, verdict in enumerate(cls(cls.Settings.model_validate(settings)).apply(documents)):
            if verdict and verdicts[number] is None:
                verdicts[number] = Rejection(f"{kind}: {verdict.reason}", verdict.detail)
    return verdicts


def judge(texts: list[str]) -> Counter[str | None]:
    return Counter(verdict.reason if verdict else None for verdict in answers(texts))


def show(texts: list[str], wrong: Callable[[Rejection | None], bool], most: int) -> None:
    chosen = [(text, verdict) for text, verdict in zip(texts, answers(texts) if most else []) if wrong(verdict)]
    for text, verdict in chosen[:most]:
        print(f"    {verdict.reason + ' ' + verdict.detail if verdict else 'kept'}: {text[:160]!r}")


# What machines make


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words(
    "手机 电脑 价格 批发 厂家 直销 免费 下载 棋牌 彩票 贷款 代开 发票 减肥 丰胸 招聘 兼职 传奇 私服 游戏 "
    "官网 注册 登录 优惠 折扣 包邮 正品 代购 视频 在线 观看 高清 小说 全文 阅读 北京 上海 广州 深圳 装修 "
    "搬家 保洁 维修 空调 冰箱 洗衣机 钢管 阀门 轴承 水泵 电缆 "
)
MENU = _words(
    "首页 新闻 体育 财经 娱乐 科技 汽车 房产 教育 视频 图片 博客 论坛 登录 注册 关于我们 联系我们 网站地图 友情链接 "
    "版权声明 加入收藏 设为首页 下一页 上一页 返回顶部 更多>> 客服中心 意见反馈 "
)


def uniform(draw: random.Random, clean: list[str]) -> str:
    """Any of 20,000 characters, with punctuation now and then."""
    return "".join(
        chr(draw.randrange(0x4E00, 0x9FA5)) if draw.random() < 0.9 else draw.choice("，。、！") for _ in range(300)
    )


def common(draw: random.Random, clean: list[str]) -> str:
    """Any of the 3,755 characters of GB 2312's first level, in sentences of 5 to 25."""

    def character() -> str:
        while True:
            try:
                return bytes([draw.randrange(0xB0, 0xD8), draw.randrange(0xA1, 0xFF)]).decode("gb2312")
            except UnicodeDecodeError:
                pass

    return "".join(
        "".join(character() for _ in range(draw.randrange(5, 25))) + draw.choice("，，。") for _ in range(20)
    )


def shuffled(draw: random.Random, clean: list[str]) -> str:
    characters = list(draw.choice(clean)[:1000])
    draw.shuffle(characters)
    return "".join(characters)


def garbled_gbk(draw: random.Random, clean: list[str]) -> str:
    """UTF-8 read as GBK, with losses."""
    return draw.choice(clean).encode().decode("gbk", "replace")


def garbled_latin(draw: random.Random, clean: list[str]) -> str:
    """GBK read as Latin-1."""
    return draw.choice(clean).encode("gbk", "replace").decode("latin-1")


def key_words(draw: random.Random, clean: list[str]) -> str:
    return draw.choice([" ", "，", "|", ""]).join(draw.choices(WORDS, k=120))


def menu(draw: random.Random, clean: list[str]) -> str:
    return draw.choice(["\n", " | ", " "]).join(draw.choices(MENU, k=60))


def advertisement(draw: random.Random, clean: list[str]) -> str:
    one = f"{draw.choice(WORDS)}{draw.choice(WORDS)}哪家好？请认准{draw.choice(WORDS)}专家，质量保证，欢迎来电咨询！"
    return draw.choice(["\n", ""]).join([one] * 15)


def headlines(draw: random.Random, clean: list[str]) -> str:
    """Beginnings of texts, cut off."""
    return "\n".join(draw.choice(clean)[: draw.randrange(10, 18)].replace("\n", " ") + "..." for _ in range(25))


def numbers(draw: random.Random, clean: list[str]) -> str:
    def row() -> str:
        return f"{draw.choice(WORDS)} {draw.randrange(10**6)} {draw.random():.4f} 2024-{draw.randrange(1, 13):02}"

    return "\n".join(row() for _ in range(40))


def encoded(draw: random.Random, clean: list[str]) -> str:
    return "数据：" + base64.b64encode(draw.randbytes(400)).decode() + draw.choice(WORDS)


def filled_form(draw: random.Random, clean: list[str]) -> str:
    """One sentence of a page that a program writes, over and over, with other words in it."""
    return "".join(
        f"本公司专业提供{draw.choice(WORDS)}服务，{draw.choice(WORDS)}品质优良，价格实惠，欢迎新老客户来电咨询订购。"
        for _ in range(20)
    )


NOISE: dict[str, Callable[[random.Random, list[str]], str]] = {
    make.__name__.replace("_", " "): make
    for make in (
        uniform, common, shuffled, garbled_gbk, garbled_latin, key_words, menu, advertisement, headlines, numbers,
        encoded, filled_form,
    )
}  # fmt: skip


if __name__ == "__main__":
    main_guard(main)
