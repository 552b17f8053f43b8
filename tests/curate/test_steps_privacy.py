"""Planted identifiers in English and Chinese text, numbers that are none, and python-stdnum's verdicts on checksums."""

import random
import time

import pytest

from megalm.curate.document import Document
from megalm.curate.steps.privacy import Privacy, PrivacySettings, id_card, luhn

KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA7bq9\nq2w3e4r5t6y7\n-----END RSA PRIVATE KEY-----"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
IDENTIFIERS = {
    "EMAIL": ["zhang.san@example.com", "li_si-01@mail.example.com.cn", "o'brien+news@example.org", "a@b.io",
              "user@[2001:db8::1]", "li.si@[IPv6:2001:4860:4860::8888]", "zhang@[192.168.7.40]", "a@[::ffff:1.2.3.4]"],
    "IP": ["203.0.114.45", "8.218.33.200", "2001:4860:4860::8888", "2400:3200:baba:0:0:0:0:1", "2A00:1450:4009::200E",
           "2a00::1", "::ffff:1.2.3.4", "::FFFF:8.218.33.200", "64:ff9b::8.8.8.8", "2001:4860:0:2001::68"],
    "PHONE": [
        "13800138000", "18612345678", "+8615912345678", "+86 177-1234-5678", "139 1234 5678", "010-62345678",
        "(010) 62345678", "0755-8234567", "400-820-8820", "+44 20 7946 0958", "+4512345678",
        "(415) 555-2671", "415-555-2671",
    ],
    "ID_CARD": ["11010519491231002X", "440524188001010014", "11010519491231002x"],
    "BANK_CARD": ["4111111111111111", "5555 5555 5555 4444", "378282246310005",
                  "6222021001116245702", "6011-1111-1111-1117"],
    "KEY": [
        "AKIAIOSFODNN7EXAMPLE", "ghp_" + "a1B2c3D4e5F6" * 3, "github_pat_11ABCDEFG0abcdefghijklmn_opq", JWT, KEY,
        "sk-proj-abcdEFGH1234ijklMNOP5678", "xoxb-123456789012-abcdefGHIJKL",
        "AIza" + "SyA1b2C3d4E5" * 2 + "SyA1b2C3d4E",
    ],
}  # fmt: skip
AROUND = [
    "Write to {} for more.", "{}", "contact: {}, thanks", "<p>{}</p>", "He said “{}”.",
    "我的是{}请查收", "联系：{}。", "（{}）", "请用{}，谢谢", "小王{}小李",
]  # fmt: skip


def replaced(text: str, **settings: object) -> str:
    document = Document("1", text)
    assert Privacy(PrivacySettings(**settings)).apply([document]) == [None]
    return document.text


@pytest.mark.parametrize("kind", IDENTIFIERS)
def test_planted_identifiers_are_found_whole_in_english_and_chinese(kind):
    missed = [
        text
        for identifier in IDENTIFIERS[kind]
        for around in AROUND
        for text in [around.format(identifier)]
        if replaced(text) != around.format(f"<{kind}>")
    ]
    assert not missed


def test_identifiers_that_stand_beside_others_are_found():
    for text, expected in [
        ("6222021001116245702 13800138000", "<BANK_CARD> <PHONE>"),
        ("card 4111111111111111 12/27", "card <BANK_CARD> 12/27"),
        ("卡号6222021001116245702 2025年", "卡号<BANK_CARD> 2025年"),
        ("zhangsan@qq.com 13912345678", "<EMAIL> <PHONE>"),
        ("学号2019012345 张三 13912345678", "学号2019012345 张三 <PHONE>"),
        ("13912345678张伟", "<PHONE>张伟"),
        ("zhang@example.com-市场部", "<EMAIL>-市场部"),
        ("dev 8.218.33.200", "dev <IP>"),
        ("IP:2001:4860:4860::8888", "IP:<IP>"),
        ("IPv6:2001:4860:4860::8888, source:2400:3200::1", "IPv6:<IP>, source:<IP>"),
        ("服务器地址:2001:4860:4860::8888。", "服务器地址:<IP>。"),
        ("打开http://[2001:4860:4860::8888]:8080/即可", "打开http://[<IP>]:8080/即可"),
        ("64 bytes from 2001:4860:4860::8888: icmp_seq=1", "64 bytes from <IP>: icmp_seq=1"),
        ("ssh root@2001:4860:4860::8888 或 root@8.218.33.200", "ssh root@<IP> 或 root@<IP>"),
        ("2001:4860:4860::8888/64，2001:4860:4860::8844。", "<IP>/64，<IP>。"),
        ("12:30:bob@example.com wrote, 12:30:45:139-1234-5678", "12:30:<EMAIL> wrote, 12:30:45:<PHONE>"),
        ("www.example.com 13912345678", "www.example.com <PHONE>"),
        ("网址：www.example.com　手机13912345678", "网址：www.example.com　手机<PHONE>"),
        ("www.example.com, 13912345678", "www.example.com, <PHONE>"),
        ("官网www.example.com张三13912345678", "官网www.example.com张三<PHONE>"),
        ("(http://example.com/a) 415-555-2671", "(http://example.com/a) <PHONE>"),
        ("www.example.com 6222021001116245702", "www.example.com <BANK_CARD>"),
    ]:
        assert replaced(text) == expected


def test_long_texts_of_nothing_but_candidates_take_no_squares():
    """A second where they did take many minutes."""
    began = time.process_time()
    for text in (
        "sk-" * 20_000,
        "token" * 12_000 + "=" + "a" * 30,
        " ".join(["13912345678"] * 5_000),
        "a:" * 30_000,
        "x" * 60_000 + ":1:2",
        "www." * 15_000,
        "12:30:a@" * 5_000,
    ):
        replaced(text)
    assert time.process_time() - began < 20


PIECES = ["token=a.1", "token=a1-", "token=aA1bcdefghijklmnopqrstuv.", "xoxb-", "-eyJaaaaaaaa"]


@pytest.mark.parametrize("piece", PIECES)
def test_eight_times_the_text_takes_about_eight_times_as_long(piece):
    """Where each piece could begin a key that the next ones go on with; with squares it is 64 times."""

    def took(pieces: int) -> float:
        began = time.process_time()
        replaced(piece * pieces)
        return time.process_time() - began

    assert min(took(8_000) for _ in range(2)) < 24 * min(took(1_000) for _ in range(3))


def test_long_keys_are_replaced_whole():
    words = "aB3" * 3_000
    assert replaced(f"token={words} and xoxb-{words}") == "token=<KEY> and <KEY>"
    assert replaced(f"eyJ{words[:4_000]}.eyJ{words}.{words}.") == "<KEY>."


NUMBERS = """
The population was 1,411,778,724 in 2020 and 13800000000 yuan were spent. 公司营收15812345678元，共有13912345678人次。
pi is 3.14159265358979323846, e is 2.71828182845904, c is 299792458 m/s, 1/3 = 0.33313812345678
订单号：6222021001116245702，运单号4111111111111111，流水号13812345678901234
Order no. 4111111111111111, ISBN 978-7-111-12345-6, ISBN 9787111123453, tracking number 13812345678
Between 2019-2020 and 2021-12-31 12:30:45.123456, timestamps 1699999999 and 1699999999999, 20231105123456
Version 10.0.19041.1, v1.2.3.4, section 1.2.10.4, build 203.0.114.45, 版本号是1.120.33.4
身份证样例110105194912310021（校验码不对） 123456789012345678 111111111111111111 110105194913310028
4111111111111112 1234567890123456 0000000000000000 5555555555554445
id=13812345678&page=2 https://example.com/news/13812345678.html img_13812345678.jpg
0x7fffffffffff deadbeef13812345678cafe a1b2c3d4-e5f6-7890-abcd-ef1234567890
E=mc^2, f(x)=12345678901, 1-800 m, 2-3 4-5 6-7 8-9, 100-200-300, 10 000 000 000, 12 345 678 901
There are 400-120-200=80 left, 500-1200-200, 4111111111111111abc
(a*b)+341275144, photo 4153438231537373298.jpeg, 65x698_4111111111111111
https://example.com/goods/a-13812345678, www.example.com/13812345678 www.13812345678.com, www.example.com?p~13812345678
网址www.example.com/13812345678，见http://example.com/page/13812345678.html。图在https://example.com/6222021001116245702
1:2:3:4:5:6:7:8, 2001::1, 12::30:5, ::1, ::, 2001:db8::1, 样例2001:db8::1。fe80::1, fd00::12:1, ::ffff:192.168.1.1
a::b::c::d, 00:1a:2b:3c:4d:5e, 2001:4860:4860::8888xyz, 20:01:48:60:48:60:88:88, 2023:10:12:30:45, 2001:12:30
dead:beef::cafe, user@[12:30], 2001:4860:4860:8888, 12:2a00:1, ::ffff:1.2, x::ffff:999.2.3.4
std::vector<int>, 12:30:45, a::b::c, 16:9, ratio 1:2:3:4, fe80::1, 192.168.1.1, 127.0.0.1, 0.0.0.0, 255.255.255.0
user@localhost, @mention, image@2x.png, a @ b, 5@3
12345678901 22345678901 1380013800 138001380000 12012345678 19412345678
token = undefined_identifier_of_some_length, password: correcthorsebatterystaple, sk-learn-contributors-guide-2
"""


@pytest.mark.parametrize("line", NUMBERS.strip().splitlines())
def test_plain_numbers_stay(line):
    assert replaced(line) == line


def test_random_numbers_are_hardly_ever_taken():
    """Numbers of 5 to 17 digits in Chinese text, which begin as mobile numbers do in one of thirty cases."""
    draw = random.Random(0)
    lengths = [5, 6, 7, 8, 9, 10, 12, 13, 14, 15, 17]
    texts = [f"数值为{draw.randrange(10 ** (length - 1), 10**length)}。" for length in lengths for _ in range(300)]
    taken = [text for text in texts if replaced(text) != text]
    assert len(taken) <= 3, taken


def test_checksums_are_those_of_python_stdnum():
    ric = pytest.importorskip("stdnum.cn.ric")
    from stdnum import luhn as reference

    draw = random.Random(0)
    for _ in range(2000):
        digits = str(draw.randrange(10**15, 10**16))
        assert luhn(digits) == reference.is_valid(digits)
    seen = set()
    for _ in range(3000):
        born = f"{draw.randrange(1930, 2020)}{draw.randrange(1, 13):02}{draw.randrange(1, 32):02}"
        number = f"110105{born}{draw.randrange(1000):03}{draw.choice('0123456789X')}"
        assert id_card(number) == ric.is_valid(number), number
        seen.add(id_card(number))
    assert seen == {True, False}


def test_a_private_key_that_is_cut_off_is_replaced_to_its_end():
    head = KEY.partition("-----END")[0].rstrip()
    assert replaced(f"Key:\n{head}") == "Key:\n<KEY>"
    assert replaced(f"Key:\n{head}\n\nMore text.") == "Key:\n<KEY>\n\nMore text."


def test_full_width_digits_are_digits():
    assert replaced("电话：１３８００１３８０００。") == "电话：<PHONE>。"


def test_several_in_one_text_are_counted_by_kind():
    document = Document("1", "张三 13800138000 zhang@example.com，李四 13900139000；身份证11010519491231002X。")
    Privacy(PrivacySettings()).apply([document])
    assert document.text == "张三 <PHONE> <EMAIL>，李四 <PHONE>；身份证<ID_CARD>。"
    assert document.metadata["privacy"] == {"phone": 2, "email": 1, "id_card": 1}


def test_settings_choose_kinds_and_placeholder_and_a_list_of_people_goes():
    text = "a@example.com 13800138000 192.168.7.40"
    assert replaced(text, kinds=["email"], placeholder="[{kind}]") == "[EMAIL] 13800138000 192.168.7.40"
    assert replaced(text, private_ips=True) == "<EMAIL> <PHONE> <IP>"
    own = "样例2001:db8::1，fe80::1, fd00::12:1, ::ffff:192.168.1.1"
    assert (replaced(own), replaced(own, private_ips=True)) == (own, "样例<IP>，<IP>, <IP>, <IP>")
    (verdict,) = Privacy(PrivacySettings(reject_above=1)).apply([Document("1", text)])
    assert verdict is not None
    assert (verdict.reason, verdict.detail) == ("too many personal data", "2")
