"""The glossary: every id a program may use, and its word in each language.

Programs contain only ids, which are ASCII because clingo's logger crashes on anything else, and lower case because an
upper-case name is a variable. Words are short and common, so that a small student spends its tokens on reasoning.
Words in a pool are distinct in every language, so that options with different ids have different texts.
"""

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
Phrase = Mapping[Language, str]


def _pool(listing: str, *, proper: bool = False) -> dict[str, Phrase]:
    """Parse "id=chinese id=chinese"; the English word is the id, capitalised if the words are proper names."""
    pairs = (entry.split("=") for entry in listing.split())
    return {key: {"en": key.capitalize() if proper else key, "zh": chinese} for key, chinese in pairs}


NAMES = _pool(
    "ann=小安 bob=小波 dan=小丹 eva=小华 fay=小飞 hal=小海 jon=小军 kim=小金 leo=小龙 mia=小美 pam=小萍 sam=小山 "
    "tom=小童 amy=小梅 ben=小本 joe=小乔 max=小强 roy=小林 sue=小苏 lee=小李 jack=小杰 mary=小玉 paul=小宝 anna=小娜 "
    "mark=小马 lucy=小露 emma=小艾 john=小江",
    proper=True,
)
TRAITS = _pool("kind=善良 loud=吵闹 calm=冷静 wise=睿智 tall=高大 shy=害羞 brave=勇敢 rich=富有 quick=敏捷 neat=整洁")
COLOURS = _pool("red=红 blue=蓝 green=绿 gold=金 pink=粉 grey=灰 black=黑 white=白 brown=棕")
CITIES = _pool(
    "rome=罗马 oslo=奥斯陆 lima=利马 cairo=开罗 paris=巴黎 delhi=德里 tokyo=东京 berlin=柏林 "
    "madrid=马德里 london=伦敦 boston=波士顿",
    proper=True,
)
DAYS = _pool(
    "monday=星期一 tuesday=星期二 wednesday=星期三 thursday=星期四 friday=星期五 saturday=星期六 sunday=星期日",
    proper=True,
)
WEATHER = _pool("sunny=晴朗 rainy=下雨 windy=刮风 snowy=下雪 cloudy=多云 hot=炎热 cold=寒冷")
GOODS = _pool("tea=茶 rice=米 bread=面包 milk=牛奶 salt=盐 books=书 toys=玩具 shoes=鞋")
DEVICES = _pool(
    "machine=机器 box=盒子 robot=机器人 wand=魔杖 phone=手机 clock=时钟 drum=鼓 lamp=灯 tool=工具 computer=电脑"
)
VERDICTS: dict[str, Phrase] = {"yes": {"en": "Yes", "zh": "是"}, "no": {"en": "No", "zh": "否"}}

POOLS = (NAMES, TRAITS, COLOURS, CITIES, DAYS, WEATHER, GOODS, DEVICES, VERDICTS)
GLOSSARY: dict[str, Phrase] = {key: phrase for pool in POOLS for key, phrase in pool.items()}


def word(term: str | int) -> Phrase:
    """The words for a term of a program: from the glossary, or the number itself."""
    text = str(term)
    return GLOSSARY[text] if text in GLOSSARY else {language: str(int(text)) for language in LANGUAGES}


def say(template: Phrase, **terms: str | int | Phrase) -> Phrase:
    """Fill a template in every language; ids and numbers become words, phrases are inserted as they are."""
    phrases = {slot: word(term) if isinstance(term, str | int) else term for slot, term in terms.items()}
    return {
        language: template[language].format_map({slot: phrase[language] for slot, phrase in phrases.items()})
        for language in LANGUAGES
    }


def join(phrases: list[Phrase], glue: Phrase) -> Phrase:
    """Join phrases with the glue of each language."""
    return {language: glue[language].join(phrase[language] for phrase in phrases) for language in LANGUAGES}


def sentences(phrases: list[Phrase]) -> Phrase:
    """Join sentences, with a space between them in English and nothing in Chinese."""
    return join(phrases, {"en": " ", "zh": ""})
