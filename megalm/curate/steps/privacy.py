"""What identifies a person or opens a door becomes a placeholder: <EMAIL>, <PHONE>, <ID_CARD> and so on.

One pass of RE2, in linear time whatever the text, finds where anything could be; only there the exact expressions and
the checks run: checksums of ID cards and bank cards, ranges of numbers, and what stands around. No expression has a
word boundary, since none stands between a Chinese character and a digit: `电话13800138000` has a number.

A number that is only a number stays: prices, counts, dates, versions, order numbers, measurements.
"""

import datetime
import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import re2

from megalm.config import Config
from megalm.curate.document import Document, Rejection
from megalm.curate.step import ByDocument

Kind = Literal["key", "email", "ip", "id_card", "bank_card", "phone"]


class PrivacySettings(Config):
    kinds: list[Kind] = ["key", "email", "ip", "id_card", "bank_card", "phone"]
    """What to replace."""
    placeholder: str = "<{kind}>"
    """What stands for it; {kind} is its kind in capitals."""
    private_ips: bool = False
    """Whether addresses of private networks and of documentation (192.168.1.1, fe80::1, 2001:db8::1) are replaced:
    they identify nobody. Within an address of mail they are a part of it."""
    reject_above: int | None = None
    """A document with more of them is left out: a list of people."""


class Privacy(ByDocument):
    """Metadata `privacy` have the number of replacements by kind."""

    kind: ClassVar[str] = "privacy"
    Settings: ClassVar[type[Config]] = PrivacySettings
    settings: PrivacySettings

    def prepare(self) -> None:
        self.apply([Document("first", "Some words to begin with.")])

    def verdict(self, document: Document) -> Rejection | None:
        text, pieces, last = document.text, [], 0
        counts: dict[str, int] = {}
        for found in find(text, self.settings.kinds, self.settings.private_ips):
            pieces += [text[last : found.start], self.settings.placeholder.replace("{kind}", found.kind.upper())]
            last = found.end
            counts[found.kind] = counts.get(found.kind, 0) + 1
        if not counts:
            return None
        document.text = "".join([*pieces, text[last:]])
        document.metadata["privacy"] = counts
        total = sum(counts.values())
        if self.settings.reject_above is not None and total > self.settings.reject_above:
            return Rejection("too many personal data", f"{total}")
        return None


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """kind, and where: in characters."""

    start: int
    end: int
    kind: Kind


def find(text: str, kinds: Sequence[Kind], private_ips: bool = False) -> list[Found]:
    """In order; none overlaps another."""
    if not kinds:
        return []
    plain = text.translate(_FULL_WIDTH) if _WIDE.search(text) else text
    found: list[Found] = []
    for begin, end in _places(plain):
        taken: list[Found] = []
        busy = bytearray(end - begin)
        for kind in _ORDER:
            if kind in kinds:
                for start, stop in _FINDERS[kind](plain, begin, end + _AHEAD, private_ips):
                    if stop <= end and not any(busy[start - begin : stop - begin]):
                        busy[start - begin : stop - begin] = b"\1" * (stop - start)
                        taken.append(Found(start, stop, kind))
        found += sorted(taken)
    return found


_AHEAD = 8  # characters behind a place that an expression looks at
_ORDER: tuple[Kind, ...] = ("key", "email", "ip", "id_card", "bank_card", "phone")
_WIDE = re.compile("[０-９＠．－Ｘ]")
_FULL_WIDTH = str.maketrans("０１２３４５６７８９＠．－Ｘ", "0123456789@.-X")  # one for one: places stay

# Where anything could be. Each alternative is at least as wide as what is looked for there.
_CANDIDATE = re2.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|\n\s*\n|\z)"
    rb"|(?i:secret|passw|token|api.?key)[A-Za-z0-9_\-]{0,64}[\"']?\s{0,3}[:=]>?\s{0,3}[\"']?[A-Za-z0-9/+_=.\-]{16,}"
    rb"|[A-Za-z0-9_\-]*(?:AKIA|ASIA|gh[pousr]_|github_pat_|eyJ|sk[-_]|xox[abeprs]-|AIza|glpat-|hf_)[A-Za-z0-9_\-.]{12,}"
    rb"|[A-Za-z0-9._%+\-']*[A-Za-z0-9_%+\-]@(?:\[[0-9A-Za-z:.]+]|[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:]+[0-9.]*|[A-Za-z0-9.\-]+)"
    # With what may stand before an address of version 6 (IP:2001:...), and behind what looks like one (12:30:a@b.io).
    rb"|[0-9A-Za-z]*:(?:[0-9A-Fa-f]{0,4}:)+[0-9A-Za-z._%+\-@]*"
    rb"|[+(]*[0-9](?:[ ()+.\-]{0,3}[0-9]){5,}[xX]?"
)


def _places(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end, in characters, of what RE2 finds in the bytes."""
    data = text.encode("utf-8", "surrogatepass")
    ascii_only = len(data) == len(text)
    place = seen = 0
    for match in _CANDIDATE.finditer(data):
        begin, end = match.span()
        if ascii_only:
            yield begin, end
            continue
        place += len(data[seen:begin].decode("utf-8", "surrogatepass"))
        seen = begin
        yield (
            place,
            place + (end - begin if match.group().isascii() else len(match.group().decode("utf-8", "surrogatepass"))),
        )


Finder = Callable[[str, int, int, bool], Iterator[tuple[int, int]]]

# Keys and tokens: https://docs.github.com/en/authentication (tokens), RFC 7519 (JWT), AWS IAM unique identifiers.
# What stands ahead is looked for nearby: to the end, from each of many places where a key could begin, takes squares.
# What is taken has no such bound, for it is not read again, and half a key in the text would be half a leak.
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----"
    r"(?:.*?-----END [A-Z ]*PRIVATE KEY(?: BLOCK)?-----|.*?(?=\n\s*\n|\Z))"
    r"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36,255}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{22,255}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])eyJ[A-Za-z0-9_-]{8,4096}+\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}"
    r"|(?<![A-Za-z0-9_-])sk-(?:[a-z]+-){0,3}(?=[A-Za-z0-9_-]{0,200}\d)(?=[A-Za-z0-9_-]{0,200}[A-Z])[A-Za-z0-9_-]{20,}"
    r"|(?<![A-Za-z0-9])[sr]k_live_[A-Za-z0-9]{20,}"
    r"|(?<![A-Za-z0-9])xox[abeprs]-(?=[A-Za-z0-9-]{0,200}\d)[A-Za-z0-9-]{16,}"
    r"|(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}(?![A-Za-z0-9])"
    r"|(?<![A-Za-z0-9])glpat-[0-9A-Za-z_-]{20,}"
    r"|(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}",
    re.DOTALL,
)
# A value that is called a secret: long, without spaces, with digits and letters of both kinds.
_SECRET = re.compile(
    r"(?i:secret|passw|token|api.?key)[A-Za-z0-9_\-]{0,64}[\"']?\s{0,3}[:=]>?\s{0,3}[\"']?"
    r"(?=[A-Za-z0-9/+_=.\-]{0,200}[0-9])(?=[A-Za-z0-9/+_=.\-]{0,200}[a-z])(?=[A-Za-z0-9/+_=.\-]{0,200}[A-Z])"
    r"([A-Za-z0-9/+_=\-]{20,})"
)


def _keys(text: str, begin: int, end: int, _: bool) -> Iterator[tuple[int, int]]:
    yield from (match.span() for match in _KEY.finditer(text, begin, end))
    yield from (match.span(1) for match in _SECRET.finditer(text, begin, end))


# RFC 5321's lengths; the local part is ASCII, so that it does not begin in the Chinese before it.
_EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9_%+-](?:[A-Za-z0-9._%+'-]{0,62}[A-Za-z0-9_%+-])?"
    r"@(?:\[(?:IPv6:)?([0-9A-Fa-f:.]{2,45})]"
    r"|(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9]|-[A-Za-z0-9]))"
)
_FILES = {"png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "ts"}  # image@2x.png


def _emails(text: str, begin: int, end: int, _: bool) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text, begin, end):
        literal = match.group(1)
        if _address(literal) if literal else match.group().rpartition(".")[2].lower() not in _FILES:
            yield match.span()


def _address(written: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(written)
    except ValueError:
        return None


_QUAD = r"(?:(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)\.){3}(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = re.compile(rf"(?<![\d.]){_QUAD}(?!\d|\.\d)")
# Behind a word and a colon, or a colon, too: IP:2001:..., 地址:2001:... A word has a letter that no number has.
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z:.])(?:(?=[0-9A-Fa-f]*[G-Zg-z])[0-9A-Za-z]+:|:(?!:))?"
    rf"((?:[0-9A-Fa-f]{{0,4}}:){{2,7}}(?:{_QUAD}|[0-9A-Fa-f]{{1,4}}|(?<=::)))(?![0-9A-Za-z]|:[0-9A-Fa-f:]|\.\d)"
)
_LETTERED = re.compile("(?=.*[A-Fa-f])[0-9A-Fa-f]{4}")
# What addresses are given out of (RFC 4291, section 2.4): a ratio 1:2:3:4:5:6:7:8 or a time is none of it.
_GLOBAL = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_VERSION = re.compile(
    r"(?i)(?:version|ver\.?|release|build|(?<![a-z])v|版本|版本号|升级到|更新到|第|chapter|section|§)[\s:：是为]{0,2}$"
)
_ADDRESS = re.compile(
    r"(?i)(?<![a-z])(?:ip|ipv4|addr|address|host|server|dns|ping|gateway|proxy|netmask|subnet|login|from)|地址|服务器|主机|网关|登录|代理"
)


def _ips(text: str, begin: int, end: int, private: bool) -> Iterator[tuple[int, int]]:
    for match in _IPV6.finditer(text, begin, end):
        parsed = _address(match.group(1))
        if not isinstance(parsed, ipaddress.IPv6Address):
            continue
        embedded = parsed.ipv4_mapped or (ipaddress.IPv4Address(int(parsed) % 2**32) if parsed in _NAT64 else None)
        if embedded:
            wanted = embedded.is_global or (private and embedded.is_private)
        else:
            wanted = (parsed in _GLOBAL and parsed.is_global) or (private and parsed.is_private)
        # 12::30 and ::1 are addresses too, but hardly ever meant as such; 2a00::1 and fe80::1 are.
        groups = [group for group in match.group(1).split(":") if group]
        if wanted and (embedded or len(groups) >= 3 or _LETTERED.fullmatch(groups[0])):
            yield match.span(1)
    for match in _IPV4.finditer(text, begin, end):
        before = text[max(0, match.start() - 24) : match.start()]
        if _VERSION.search(before) or before[-1:].isascii() and before[-1:].isalpha():
            continue
        octets = [int(part) for part in match.group().split(".")]
        # 1.2.10.4 is the number of a version or a section, unless something says that it is an address.
        if max(octets) < 32 and not _ADDRESS.search(before):
            continue
        address = ipaddress.ip_address(match.group())
        if address.is_global or (private and address.is_private and octets[0] not in (0, 127, 255)):
            yield match.span()


# GB 11643-1999: province and county (6), date of birth (8), sequence (3), check character (ISO 7064 MOD 11-2).
_ID_CARD = re.compile(
    r"(?<![0-9A-Za-z.])[1-8]\d{5}[ -]?(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])[ -]?"
    r"\d{3}[\dXx](?![0-9A-Za-z])"
)
_PROVINCES = {
    *range(11, 16),
    *range(21, 24),
    *range(31, 38),
    *range(41, 47),
    *range(50, 55),
    *range(61, 66),
    71,
    81,
    82,
    83,
}
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def id_card(number: str) -> bool:
    """Whether the 18 characters are a Chinese ID number."""
    if int(number[:2]) not in _PROVINCES or "10X98765432"[sum(
        weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number)
    ) % 11] != number[17].upper():  # fmt: skip
        return False
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    return True


def _id_cards(text: str, begin: int, end: int, _: bool) -> Iterator[tuple[int, int]]:
    for match in _ID_CARD.finditer(text, begin, end):
        if id_card(re.sub("[ -]", "", match.group())):
            yield match.span()


_BANK_CARD = re.compile(
    r"(?<![0-9A-Za-z._])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{1,4}(?:\1?\d{1,3})?(?!\1\d{2}(?!\d{0,2}/))"
    r"|\d{4}[ -]\d{6}[ -]\d{5}|\d{14,19})"
    r"(?!\d|[.](?:\d|jpe?g|png|gif|webp|html?|pdf|mp4|php)|[A-Za-z_])"
)
# First digits and lengths (ISO/IEC 7812 issuers): UnionPay, Visa, Mastercard, American Express, Discover, JCB, Diners.
_ISSUERS = re.compile(
    r"62\d{14,17}|60[13]\d{13,16}|9[4-6]\d{14,17}|4\d{15}|4\d{18}|5[1-5]\d{14}|(?:222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|(?:6011|64[4-9]\d|65\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"
)
_CARD_WORDS = re.compile(
    r"(?i)卡|账号|帐号|賬號|账户|帐户|银行|銀行|card|account|visa|mastercard|amex|unionpay|iban|bank|转账|汇款|打款|户名"
)
_NUMBER_WORDS = re.compile(
    r"(?i)(?:订单|訂單|单号|運單|运单|流水|编号|編號|序列|学号|工号|发票|货号|条码|條碼|书号|批号|型号|文号|证书|案号|时间戳|(?<![a-z])(?:order|invoice)"
    r"|(?<![a-z@])(?:serial|tracking|isbn|issn|ean|upc|sku|doi|imei|timestamp|unix|ref(?:erence)?|ticket|receipt|transaction|no\.|№|#|id\b|uid|qq"
    r"))[^\n\d。；;，,!！?？]{0,16}$"
)
# An address of the web ends at white space, at Chinese, and at what sets off a sentence or brackets.
_IN_URL = re.compile(r"(?i)(?:https?://|www\.)[a-z0-9_.~/?#@!$&*+=%-]*$")
_UNITS_AFTER = re.compile(
    r"\s?(?:[元圆圓块角分人名位个個只件次年万萬亿億兆吨噸米克斤升步条条项字页頁户亩度倍票股篇辆台套%％‰℃°²³]|美元|港元|欧元|日元|公里|千米|公斤|平方|立方"
    r"|[kKMGT]?[BbWw]\b|(?:km|kg|cm|mm|ms|kWh|USD|EUR|RMB|CNY|yuan|dollars?|euros?|people|persons?|years|users|million|billion|bytes|views|times)\b)"
)
_CURRENCY = re.compile(r"[$¥￥€£₽₹]\s?-?$")


def _bank_cards(text: str, begin: int, end: int, _: bool) -> Iterator[tuple[int, int]]:
    for match in _BANK_CARD.finditer(text, begin, end):
        digits = re.sub("[ -]", "", match.group())
        if not _ISSUERS.fullmatch(digits) or not luhn(digits) or len(set(digits)) < 2:
            continue
        before = text[max(0, match.start() - 24) : match.start()]
        if _CARD_WORDS.search(before) or not (_numbered(text, match.start()) or _plain(text, *match.span())):
            yield match.span()


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _numbered(text: str, begin: int) -> bool:
    """Whether what stands before a number makes it that of a thing, or a part of an address of the web."""
    before = text[max(0, begin - 200) : begin]
    return bool(_NUMBER_WORDS.search(before[-24:]) or _IN_URL.search(before))


def _plain(text: str, begin: int, end: int) -> bool:
    """Whether what stands around makes a number an amount."""
    if _CURRENCY.search(text[max(0, begin - 3) : begin]) or _UNITS_AFTER.match(text, end):
        return True
    digits = re.sub(r"\D", "", text[begin:end])
    return digits.endswith("000000")


# Prefixes of mobile networks in mainland China (MIIT's allocations), and no longer digits around.
_MOBILE = re.compile(
    r"(?<![0-9.])(?:(?:\+|00)?86[ -]?|\(\+?86\)[ -]?)?"
    r"1(?:3\d|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8\d|9[0-35-9])([ -]?)\d{4}\1\d{4}(?!\d|\.\d)"
)
_LANDLINE = re.compile(
    r"(?<![0-9.A-Za-z-])(?:(?:\+|00)86[ -]?)?"
    r"(?:\(0\d{2,3}\)[ -]?|0(?:10|2\d|[3-9]\d{2})-)[2-8]\d{6,7}(?:-\d{1,5})?(?![0-9-])"
    r"|(?<![0-9.A-Za-z-])[48]00-?(?:\d{3}-\d{4}|\d{4}-\d{3}|\d{7})(?![0-9-])"
)
# With a plus, or as North America writes them (area and exchange codes begin with 2 to 9).
_INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z+)\]])\+(?=(?:[ .()-]*\d){10,15}(?!\d))[1-9]\d{0,2}(?:[ .-]{0,2}(?:\(\d{1,5}\)|\d))+(?!\d)"
)
_AMERICAN = re.compile(
    r"(?<![0-9.A-Za-z-])(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([.-]))[2-9]\d{2}(?(1)\1|-)\d{4}(?!\d|[.-]\d)"
)
_PHONE_WORDS = re.compile(
    r"(?i)(?:电话|電話|手机|手機|联系|聯絡|致电|热线|熱線|咨询|拨打|短信|传真|微信|号码|tel|phone|mobile|cell|fax|call|whatsapp|contact|sms|dial)"
    r"[^\n。；;]{0,16}$"
)


def _phones(text: str, begin: int, end: int, _: bool) -> Iterator[tuple[int, int]]:
    for pattern in (_MOBILE, _LANDLINE, _INTERNATIONAL, _AMERICAN):
        for match in pattern.finditer(text, begin, end):
            start, stop = match.span()
            before, after = text[max(0, start - 24) : start], text[stop : stop + 1]
            if _PHONE_WORDS.search(before):
                yield start, stop
                continue
            # In the middle of a name, an address of the web or a calculation it is none.
            glued = before[-1:].isascii() and (before[-1:].isalpha() or before.endswith(tuple("_/=&#%")))
            if glued or (after.isascii() and after.isalpha()) or after in tuple("_%=*^") or _numbered(text, start):
                continue
            if pattern is _LANDLINE and match.group()[0] in "48" and "-" not in match.group():
                continue  # 4008123123 may be anything
            if not _plain(text, start, stop):
                yield start, stop


_FINDERS: dict[Kind, Finder] = {
    "key": _keys,
    "email": _emails,
    "ip": _ips,
    "id_card": _id_cards,
    "bank_card": _bank_cards,
    "phone": _phones,
}
