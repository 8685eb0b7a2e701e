"""Phrases that choose an option, in ten languages, and options named in words.

A phrase counts only as a statement: never in a question, after a negation, in a list of letters, or where its
letter may be the article "A". All letters are treated alike. A named option counts only if it is the only
one, not denied, and not a mark of something else ("next to the black laptop").
"""
import re
from functools import lru_cache

from utils.reply_text import EDGES, TEX, fold


def either(words: str) -> str:
    """Return a pattern of words; an underscore is a space within one."""
    return "|".join(words.split()).replace("_", " ")


OPTION_NOUN = either("option choice letter auswahl opción alternativa letra choix lettre opção opzione "
                     "alternative lettera вариант выбор буква")
NOUN = OPTION_NOUN + "|" + either(
    "answer ans\\.? solution selection selected conclusion result response output guess verdict prediction "
    "(?:correct|label)(?=\\**:) assistant antwort lösung respuesta réponse resposta risposta ответа? "
    "antwoord odpowiedź cevap jawaban(?:nya)? đáp_án")
VERB = either("(?:i|we)(?:['’]d|_would|_will|['’]ll|['’]m|_am)?_(?:choose|pick|select|go(?:ing)?_(?:with|for)"
              "|opt_for|say|answer) choose pick select opt_for go_with (?:right|correct|best|close(?:st|r))_"
              "(?:one|match|statement|description|image|order|value|point) richtig_ist ich_wähle elijo "
              "escojo je_choisis escolho scelgo выбираю")
WEAK = either("it_is it['’]s it_(?:must|should|has_to)_be so hence therefore thus final also i\\.e\\. donc "
              "por_tanto portanto quindi поэтому es_ist so_it_is i_(?:think|believe|guess) c['’]est es_la "
              "this_(?:matches|corresponds_to) (?:la_)?correcta_es is(?=_(?:option|choice|letter)\\b) "
              "(?:matches|fits|corresponds_to)(?=_(?:option|choice|letter)\\b|_?\\()")
CJK_OPTION = either("选项 選項 選択肢 보기 선택지")
CJK = CJK_OPTION + "|" + either("答案 結論 结论 答え 答 解答 回答 正解 正答 정답 답변 답 故选 应选 选择 選択 選擇 选 選 "
                                "正确的是")
ANSWER = re.compile("ans|antwort|respu|respos|réponse|risposta|ответ", re.IGNORECASE)
FILLER = either("is was be are should would must will has_to the correct right best final option choice "
                "answer letter clear clearly simply just probably likely most seems appears seems_to "
                "appears_to definitely indeed then therefore thus hence ist lautet die richtige antwort es "
                "la el correcta opción letra respuesta sería est réponse bonne correcte finale richtig "
                "korrekte lettre opção correta certa resposta è corretta giusta opzione lettera это "
                "правильный правильная вариант ответ буква adalah đúng là")
SMALL_FILLER = either("é a o l 就 应该 应當 應該 应当 选项 选择 正确 是 为 為 应 選 选 は が 은 는 이 가")
GAP = r"[\s*_`\"'“”‘’«»(\[{<$【】「」『』:=,>→–—#-]"
LABEL = re.compile(
    rf"(?:(?<![^\W_])(?<![</])(?i:(?P<noun>{NOUN})|(?P<verb>{VERB})|(?P<weak>{WEAK}))(?![^\W_])"
    rf"|(?P<cjk>{CJK}))(?P<which>\s+(?:that|which|to|for|of|among|from|in|here)\b"
    r"[^.,;:!?\n]{1,60}?\b(?:is|must be|would be)\b)?"
    rf"(?P<gap>(?:{GAP}|…|\.\.+|\\[(\[]|(?<!\w)(?i:{FILLER})(?=\W)|(?<![A-Za-zÀ-ÿ])(?:{SMALL_FILLER}))*)"
    r"(?<![A-Za-z0-9À-ÿ])([A-Za-z])(?![A-Za-z0-9À-ÿ]|['’][a-z])")
LETTER_FIRST = re.compile(
    r"(?<![\w'’])([A-Z])[)\]\"'*_.:】」]*\s*(?:(?i:(?:(?:is|(?:must|should|would) be)\s+(?:(?:the|my|our)\s+)?"
    r"|(?<=[A-Z] )the\s+)(?:(?:only|most)\s+)?(?:correct|right|best|final|answer|choice)(?!\w)"
    r"|(?:it is|(?:seems|looks) (?:right|correct)|(?:fits|matches)(?: best)?)[.!]*\s*$)|(?:选?项)?是?正确|が正"
    r"|を選|です|(?:번)?\s*(?:이|가)\s*(?:정답|맞)|입니다|ist (?:die )?(?:richtig|korrekt)|es (?:la )?(?:corr|resp)"
    r"|est (?:la )?(?:bonne|correct|réponse)|[éè] (?:[al]a? )?(?:corret|risp|resp))")
LISTED = re.compile(
    r"[\s)\]*\"'.]*(?:(?:,|/|、|&|\||(?:or|and|oder|und|ou|et|o|y|e|или|и)(?!\w)|或者?|还是|還是|和|または|또는)\s*)+"
    r"(?:(?:option|choice|possibly|maybe|perhaps)\s+)*[(\[*\"']*([A-Z])(?![A-Za-z0-9]|\s+(?:is|was)\b)")
FUNCTION_WORD = re.compile("(?:" + either(  # after a letter; before another word "A" would be the article
    "a[st] in on with from and or but because since for which that this based given is was are to by due not "
    "so here if when where while the it of according corresponding rather instead has will would should must "
    "can then than also there i we after before over under out only again indeed matches shows says fits "
    "without weil da porque car parce pois denn y et und e ist est es é è") + r")\b")
NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|except|unlike|(?:any\w*|all) but|rather than"
    r"|instead of|whether|wrong|incorrect|nicht|kein\w*|niemals|weder|pas|jamais|aucune?|nunca|ningun\w*|não"
    r"|nem|non|не|нет|ни)\b|n['’]t\b|\?|不|没|沒|非|无法|未|ない|なく|ません|아[니닙닌]|않|없")
DENIED_AFTER = re.compile(r"[)」\s]*(?:\|\s*(?:no|wrong)\b|(?:では?|じゃ)(?:な|あり)|(?:이|가)?\s*아[니닙닌]|不|错|nicht\b"
                          r"|(?:is|was|ist|est|es)(?:n['’]t| not| (?:wrong|incorrect|falsch|faux))\b)")
UNSURE = re.compile(r"\b(?:if|could|can|might|maybe|perhaps|first|initially)\b", re.IGNORECASE)
SUPPOSED = re.compile(r"(?:^|[.;:!?\n])\W*(?:but |and )?[Ii]f (?:it|the|this|they|there)\b[^.;:!?\n]*$")
SINGLE = re.compile(r"(?<![A-Za-z0-9À-ÿ])[A-Za-z](?![A-Za-z0-9À-ÿ]|['’][a-z])")
WORD_AFTER = re.compile(r"\s+([a-zà-ÿ]+)")
LABEL_WINDOW = 80  # characters in which a phrase before its letter is looked for
CAPITAL = re.compile(r"(?<![A-Za-z0-9'’])[A-Z](?![A-Za-z0-9'’])")
SENTENCE_END = re.compile(  # the period of "A. red B. blue" ends no sentence
    r"(?<=[.!?])(?<!\b[A-Z]\.)[\"'”’)]*(?:\s+|(?=[一-鿿]))|(?<=。)|\n+")
CLAUSE_END = re.compile(r"[.,;:!?\n。]|\b(?:so|thus|hence|therefore|but|The)\b")
CLOSED = re.compile(r"[\s*_`\"'”’)\]}>$】」]*(?:[.!,;:。]|$|\n|\(|because|since|as\b|[一-鿿])")
SMALL_CLOSED = re.compile(r"[\s*_`\"'”’)\]}>$]*(?:[.!,;:](?!\w)|$|\n)")
TURNED = re.compile(
    r"\b(?:wait|actually|hold on|correction|hmm+|on second thought|looking (?:again|closer)|i was wrong|sorry"
    r"|let me (?:re)?check|moment mal|espera|attendez|espere|подождите)\b|不对|等等|等一下|待って|잠깐")
BUT = re.compile(r"\b(?:but|however|no,|aber|pero|mais|mas|но)(?!\w)|但|しかし|하지만")
BESIDE = re.compile(  # before another thing's name: a place, or (the group) what someone has
    r"(?:(?:next|close|adjacent) to|beside|near|behind|against|alongside|(?:front|left|right|top) of|under"
    r"|below|above|inside|(with|holding|wearing|like|unlike))\s+"
    r"(?:the |an? |its |their |his |her |some |another )?$")
OWN_PLACE = re.compile(r"(?: (?!and|but|it)[a-z]+)? (?:is|are|stands|sits|lies)\b")
CONTRAST = re.compile(
    r"(?:(?:[,;(–—-]\s*|\s(?=and|but))(?:and |but )?not\b|[,\s]\s?(?:rather than|instead of|as opposed to)\b"
    r"|,\s*(?:而不是|而非|不是))[^.,;!?\n。]*")
PLAN = re.compile(r"\b(?:let(?: me|'s)|i'll|i (?:will|need|should|must)|to determine|going to|label|if)\b"
                  r"|(?:^|\b(?:is|stands|sits|lies)\b.*)\b(?:next to|beside|near|behind|under|above) it\b")


def split_sentences(text: str) -> list[str]:
    return [sentence for sentence in SENTENCE_END.split(text) if sentence.strip(EDGES)]


def find_phrase(text: str, options: dict[str, str]) -> tuple[str | None, int]:
    """Return the letter of the last phrase that chooses one, and where the phrase ends (-1 without one)."""
    text = TEX.sub(lambda command: command[0] if "box" in command[0] else  # as long as it was
                   " " * (len(command[0]) - len(command[1]) - 1) + command[1] + " ", text)
    for letter in reversed(list(SINGLE.finditer(text))):  # the last first, each with the words before it
        place = letter.end()
        if letter[0].upper() not in options or letter[0].islower() and not SMALL_CLOSED.match(text, place):
            continue
        word = WORD_AFTER.match(text, place)
        option, first = fold(options[letter[0].upper()]), LETTER_FIRST.match(text, letter.start())
        if word and not first and not FUNCTION_WORD.match(word[1]) and option.split(" ")[0] != word[1]:
            continue  # the article: "A red cup"
        labels = LABEL.finditer(text, max(0, letter.start() - LABEL_WINDOW), place)
        matches = [match for match in labels if match.end() == place]
        for match in filter(None, [*matches, first]):
            if chooses(text, match, letter[0], place, options):
                return letter[0].upper(), match.end()
    return None, -1


def chooses(text: str, match: re.Match, letter: str, end: int, options: dict[str, str]) -> bool:
    """Return whether a phrase chooses: not asked, denied, listed or before another option's text."""
    after = text[end:end + 200]
    window = text[max(0, match.start() - 100):match.start()]
    before = window if SUPPOSED.search(window) else CLAUSE_END.split(window)[-1]
    before += match["which"] or "" if match.re is LABEL else ""
    if NEGATION.search(before.lower()) or UNSURE.search(before):
        return False
    listed, asked = LISTED.match(after), re.match(r"[^.!\n。]{0,80}\?", after)
    if (listed and listed[1] in options) or DENIED_AFTER.match(after) or asked:
        return False
    if match.re is LABEL:
        if match["weak"] and not re.search(NOUN, match["gap"], re.I):  # an option may say a letter, too
            said = [other for other in options if letter in CAPITAL.findall(options[other])]
            if letter.islower() or not CLOSED.match(after) or set(said) - {letter}:
                return False
        direct = not match["gap"].strip(" *_`\"'([{<$")  # "option B", without "is" or a colon
        if direct and match["noun"] and not match["which"] and not ANSWER.match(match["noun"]):
            return False
    rest = re.match(r"[\s*_)\]]*[.:,)–-]?[\s*_(]*", after).end()
    names = find_options(after[rest:].split("\n")[0], options)
    other = [n for start, _, n in names if start == 0 and n != letter.upper()]
    return not other or bool(NEGATION.search(after.lower()))


def is_corrected(rest: str, letter: str, options: dict[str, str], skip: bool = False) -> bool:
    """Return whether a later sentence takes an answer back: "Wait", "but", and another option."""
    turned = False
    for sentence in split_sentences(rest)[skip:]:
        low = sentence.lower()
        turned = turned or bool(TURNED.search(low))
        if not turned and not BUT.match(low.lstrip(" ,;.*")):
            continue
        names = {named for _, _, named in find_options(sentence, options)} | lone_letters(sentence, options)
        denied = NEGATION.search(re.sub(r"^\W*no\b", "", TURNED.sub("", low).strip(" ,")))
        if (names - {letter} and not denied) or (turned and letter in names and denied):
            return True
    return False


@lru_cache(maxsize=4096)
def option_pattern(option: str) -> re.Pattern:
    word = re.escape(fold(option, prose=True))
    return re.compile(rf"(?<![a-z0-9à-ÿ-])(?<!\d[.,:/]){word}(?![a-z0-9à-ÿ])(?![.,:/-]\d)")  # or Chinese


def find_options(text: str, options: dict[str, str]) -> list[tuple[int, int, str]]:
    """Return (start, end, letter) of options in `fold(text, prose=True)`: whole words, longest if nested."""
    text, spans = fold(text, prose=True), []
    for letter, option in options.items():
        spans += [(m.start(), m.end(), letter) for m in option_pattern(option).finditer(text) if m[0]]
    return [(start, end, letter) for start, end, letter in spans
            if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)]


def named_option(text: str, options: dict[str, str]) -> str | None:
    """Return the letter of the only option that `text` names, without a negation, a question or another
    option's letter: "The right one is B" does not name A. right. "Next to the black laptop" names nothing."""
    text = without_contrast(text, options)
    folded = fold(text, prose=True)
    spans = find_options(text, options)
    beside = [span for span in spans if (place := BESIDE.search(folded[:span[0]][-40:]))
              and (not place[1] or re.match(r" [a-z]", folded[span[1]:]))]
    spans = [span for span in spans if span not in beside
             and not re.search(r"\bthan (?:the |an? )?$", folded[:span[0]][-10:])]
    names = {letter for _, _, letter in spans}
    if len(names) != 1 or lone_letters(text, options) - names or (
            beside and OWN_PLACE.match(folded[spans[0][1]:])):  # "the red cup is near the black laptop"
        return None
    covered = {i for start, end, _ in spans for i in range(start, end)}
    around = "".join(" " if i in covered else character for i, character in enumerate(folded))
    return None if NEGATION.search(around.removeprefix("no, ")) or PLAN.search(around) else spans[0][2]


def without_contrast(text: str, options: dict[str, str]) -> str:
    """Return text without ", not B" and "rather than red", unless an option says such a thing."""
    spoken = any(CONTRAST.search(option) for option in options.values())
    return text if spoken else CONTRAST.sub("", text)


def lone_letters(text: str, options: dict[str, str]) -> set[str]:
    """Return the option letters among the words of `text`, without those that may be the article "A"."""
    letters = set()
    for match in CAPITAL.finditer(text):
        word = re.match(r"\s+([a-z]+)", text[match.end():match.end() + 30])
        if match[0] in options and not (word and not FUNCTION_WORD.match(word[1])):
            letters.add(match[0])
    return letters - set(CAPITAL.findall(" ".join(options.values())))
