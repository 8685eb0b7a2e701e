"""The rules for rows and captions: at least one accepted and one rejected case each."""
import random

import pytest
from samples import row, table

from utils.jsonl import DataError
from utils.rows import (CAPTION_REASONS, caption_fault, check_own, check_rows, count_words, find_markup,
                        has_loop, parse_options, row_fault, split_final, units_of)


@pytest.mark.parametrize("text, loops", [
    ("the cat sat on the mat and looked at the dog that ran past the house", False),
    ("the cat is red the cat is red the cat is red the cat is red", True), ("a\nb\na\nc\na", True),
    ("a\nb\na\nc", False), ("no no no no", False), ("", False)])
def test_has_loop(text, loops):
    assert has_loop(text) is loops


@pytest.mark.parametrize("reason", [None, *CAPTION_REASONS])
def test_caption_fault(reason):
    texts = [case["caption"] for case in table("captions") if case["reason"] == reason]
    assert texts and {text: caption_fault(text) for text in texts} == dict.fromkeys(texts, reason)


# words of a script, what stands between them, what ends a sentence, and where the pieces of a looping one are
# cut: (colours, things, verbs, places, between, end)
SCRIPTS = {
    "English": ("red blue green white", "boat circle dog sign", "stands hangs lies glows",
                "below above behind", " ", ". "),
    "Korean": ("빨간 파란 초록색 하얀", "배가 원이 개가 간판이", "서있다 걸려있다 누워있다 빛난다", "아래에 위에 뒤에", " ", ". "),
    "Chinese": ("红色的 蓝色的 绿色的 白色的", "小船 圆形 小狗 招牌", "停靠着 悬挂着 躺在那里 闪着光", "在下面 在上方 在后边", "", "，"),
    "Traditional Chinese": ("紅色的 藍色的 綠色的 白色的", "小船 圓形 小狗 招牌", "停靠著 懸掛著 躺在那裡 閃著光", "在下面 在上方 在後邊", "", "。"),
    "Japanese": ("赤い 青い 緑の 白い", "ボートが 丸が 子犬が 看板が", "立っている 掛かっている 寝ている 光る", "下に 上に 後ろに", "", "。"),
    "Thai": ("สีแดง สีน้ำเงิน สีเขียว สีขาว", "เรือ วงกลม สุนัข ป้าย", "ตั้งอยู่ แขวนอยู่ นอนอยู่ ส่องแสง",
             "ด้านล่าง ด้านบน ข้างหลัง", "", " "),
    "Khmer": ("ក្រហម ខៀវ បៃតង ស", "ទូក រង្វង់ ឆ្កែ ផ្លាក", "ឈរ ព្យួរ ដេក ភ្លឺ",
              "ខាងក្រោម ខាងលើ ខាងក្រោយ", "", " "),
    "mixed": ("red 蓝色的 緑の สีขาว", "boat 圆形 看板が เรือ", "stands 悬挂着 光る ตั้งอยู่",
              "below 在上方 後ろに ด้านล่าง", " ", "。")}


def sentences(rng: random.Random, script: str, n: int) -> list[str]:
    *parts, between, end = SCRIPTS[script]
    parts = [part.split() for part in parts]
    found = {between.join(rng.choice(words) for words in (parts[3], parts[0], parts[1], parts[2])) + end
             for _ in range(40 * n)}
    return rng.sample(sorted(found), n)


@pytest.mark.parametrize("script", SCRIPTS)
def test_captions_of_every_script_are_kept_and_looping_ones_rejected(script):
    rng = random.Random(script)
    for _ in range(60):
        caption = "".join(sentences(rng, script, rng.randint(2, 4))).strip()
        assert caption_fault(caption) is None, caption
        looping = caption + SCRIPTS[script][-2] + "".join(sentences(rng, script, 1)) * rng.randint(8, 12)
        assert has_loop(looping) and caption_fault(looping) in ("caption_loop", "caption_long"), looping
        stuck = (rng.choice(SCRIPTS[script][0].split()) + SCRIPTS[script][-2]) * 40  # one word
        assert caption_fault(stuck.strip()) == "caption_loop", stuck


# (what begins a refusal, what may follow, refusals that need no such beginning)
REFUSALS = {
    "Chinese": ("抱歉，|很抱歉，|非常抱歉，|对不起，|不好意思，", "看不清楚。|请重新上传。|没有内容可以描述。",
                "我无法查看图片。|我看不到图片的内容。|无法识别这张图片。|作为一个AI助手，不便回答。|作为人工智能语言模型，没有眼睛。"),
    "Traditional Chinese": ("抱歉，|很抱歉，|對不起，", "看不清楚。|請重新上傳。", "我無法查看圖片。|無法識別該圖像。|看不到圖片。"),
    "Japanese": ("申し訳ありませんが、|申し訳ございません。|すみませんが、|ごめんなさい、|恐れ入りますが、",
                 "見えません。|もう一度お送りください。",
                 "画像を見ることができません。|画像を確認できません。|写真を開くことができない。|お手伝いできません。|お答えできません。"),
    "Korean": ("죄송합니다. |죄송하지만 |미안합니다. |미안하지만 ", "잘 보이지 않습니다.|다시 올려 주세요.",
               "이미지를 볼 수 없습니다.|사진을 확인할 수 없습니다.|도와드릴 수 없습니다.|저는 언어 모델입니다."),
    "Thai": ("ขออภัย |ขออภัยค่ะ |ขอโทษครับ ", "มองไม่เห็น|กรุณาส่งใหม่",
             "ฉันไม่สามารถดูรูปได้|ผมไม่สามารถช่วยได้|ดิฉันไม่สามารถตอบได้")}
NO_REFUSALS = (  # a sign that begs pardon; what cannot be made out; words that are like those of refusals
    "门上的牌子写着“抱歉，今日休息”。|数字模糊，无法辨认。|右侧的文字看不清。|无法看清地图上的街道名。|一个模型飞机放在桌上。|学生站起来回答问题。"
    "|看板に「申し訳ございません、本日休業」と書かれている。|文字がぼやけて読めない。|壁に写真が掛かっている。|写真を撮影できない場所と書かれている。"
    "|안내문에 '죄송합니다'라고 적혀 있다.|글자가 흐려서 읽을 수 없다.|벽에 사진이 걸려 있다.|사진을 찍을 수 없다는 안내문이다."
    "|ป้ายเขียนว่า ขออภัยในความไม่สะดวก|ตัวเลขเบลอ อ่านไม่ออก|ไม่สามารถอ่านตัวเลขได้").split("|")
OTHER_FAULTS = {
    "caption_meta": "图片显示一艘红船。|この画像には赤い船がある。|이 이미지는 빨간 배를 보여준다."
                    "|ภาพนี้แสดงเรือสีแดง|为了回答问题，看一下船。",
    "caption_leak": "答案是42。|正解はBである。|정답은 42입니다.|คำตอบคือ 42"}


@pytest.mark.parametrize("script", REFUSALS)
def test_refusals_in_every_script(script):
    begun, goes_on, alone = (texts.split("|") for texts in REFUSALS[script])
    for text in [*(start + rest for start in begun for rest in goes_on + alone), *alone,
                 *(f"\n{start}42。" for start in begun)]:
        assert caption_fault(text) == "caption_refusal", text


def test_what_is_no_refusal_in_other_scripts():
    assert {text: caption_fault(text) for text in NO_REFUSALS} == dict.fromkeys(NO_REFUSALS)
    for reason, joined in OTHER_FAULTS.items():
        texts = joined.split("|")
        assert {text: caption_fault(text) for text in texts} == dict.fromkeys(texts, reason)


def test_words_are_counted_in_every_script():
    for script in SCRIPTS:
        one = sentences(random.Random(script), script, 1)[0]
        assert 2 <= count_words(units_of(one)) <= 8, one  # four words
    for text in ("The hull shows a 42!", "l’été – “très” bien", "Ünï  côdé\u00a0x", "Привет, мир",
                 "مرحبا بالعالم", "नमस्ते दुनिया", "빨간 배 42"):
        assert units_of(text) == text.lower().split() and count_words(units_of(text)) == len(text.split())
    assert units_of("船身写着HELLO 42。") == ["船", "身", "写", "着", "hello", "42"]


@pytest.mark.parametrize("before, final", [
    ("船身上写着42。", "所以答案是\\boxed{42}。"), ("船が見える！", "答えは\\boxed{42}です。"),
    ("هل يظهر الرقم؟ ", "الجواب \\boxed{42}"), ("नाव पर ४२ है।", "उत्तर \\boxed{42}")])
def test_the_last_sentence_is_split_off_in_other_scripts(before, final):
    assert split_final(before + final) == (before.strip(), final)


@pytest.mark.parametrize("question, options", [
    ("（A）红色\n（B）蓝色", {"A": "红色", "B": "蓝色"}), ("A、红色\nB、蓝色", {"A": "红色", "B": "蓝色"}),
    ("A．赤\nB．青", {"A": "赤", "B": "青"}),
    ("What?\nOptions:\nA. a cat\nB. a dog\nPlease select", {"A": "a cat", "B": "a dog"}),
    ("(A) x\n(B) y", {"A": "x", "B": "y"}), ("A. only one", {}), ("B. x\nC. y", {}), ("What is it?", {}),
    ("    - A. Success.\n    - B. Fail.", {"A": "Success.", "B": "Fail."}),
    ("I saw A. Smith and B. Jones", {})])
def test_parse_options(question, options):
    assert parse_options(question) == options


def test_row_fault():
    for case in table("row_faults"):
        assert row_fault(row(**case["changes"])) == case["reason"], case


@pytest.mark.parametrize("char", ["\0", "\x07", "\x08", "\x1b", "\x7f", "\x9b"])
def test_a_control_character_rejects_a_row_wherever_it_stands(char):
    text, other = f"I look{char} closer.", row()
    steps = other["steps"]
    for changes in ({"question": f"What{char}?"}, {"answer": f"42{char}"}, {"chain": other["chain"] + char},
                    {"steps": [{"text": text}, *steps[1:]]},
                    {"steps": [steps[0], steps[1] | {"caption": text}, steps[2]]}):
        assert row_fault(row(**changes)) == "control" and row_fault(other) is None
    assert caption_fault(f"a red{char} boat") == "caption_markup" and find_markup(text) == {char}


@pytest.mark.parametrize("changes, match", [
    ({"images": [1]}, "field 'images' should be a list of paths"), ({"steps": ["text"]}, "step 1 should be"),
    ({"steps": [{"text": 1}]}, "step 1 should be"),
    ({"steps": [{"image": "a", "operation": "cut"}]}, "step 1 should be"),
    ({"steps": [{"text": "a"}, {"image": "a"}]}, "step 2 should be")])
def test_check_own(changes, match):
    check_own("x:1", row())
    with pytest.raises(DataError, match=f"x:1: {match}"):
        check_own("x:1", row(**changes))


def test_check_rows_keeps_the_first_accepted_duplicate(tmp_path, picture, capsys):
    picture("a.png"), picture("b.png", color="blue"), picture("copy.png")
    rows = [row(id="bad", steps=[]), row(id="no file", images=["no.png"]), row(id="first"),
            row(id="same", images=["copy.png"]), row(id="other", question="Another?")]
    checked = check_rows(rows, tmp_path)
    assert [one.reason for one in checked] == ["structure", "image_missing", None, "duplicate", None]
    assert checked[3].detail.endswith("of first") and len(checked[2].hashes) == 2
    with pytest.raises(DataError, match="--image_root .*nowhere: no such folder"):
        check_rows(rows, tmp_path / "nowhere")
    assert "no row has its images" not in capsys.readouterr().err
    (tmp_path / "elsewhere").mkdir()
    assert {one.reason for one in check_rows(rows[1:], tmp_path / "elsewhere")} == {"image_missing"}
    err = capsys.readouterr().err
    assert "no row has its images under --image_root" in err and "elsewhere/no.png" in err
