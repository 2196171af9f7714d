"""Compose dialogues of a small everyday world out of the pieces in ``dialogues/``.

    python data/make_dialogues.py --show 20 [--only weather]      look at some
    python data/make_dialogues.py --count 100000                  how many of them are different

``make_tiny_llama.py`` pretrains on what :func:`dialogues` yields; the corpus itself is never stored.
A piece is a topic with ways of asking and of answering (see ``dialogues/README.md`` for the notation);
:func:`dialogues` draws who is asked, under which system prompt, in which voice, and how many turns.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).parent
sys.path.insert(0, str(DATA.parent / "notebooks"))
from huanhuan.preprocess import normalised  # noqa: E402

PIECES = DATA / "dialogues"
READING = DATA.parent / "tests" / "reading" / "questions.json"
NAMES = ("名", "人", "号")  # slots that are no tables: the role's name, the asker's, made-up words
VOICES = ("答", "角", "古")  # the assistant's, a role's where it differs, the old-fashioned one


@dataclass
class Turn:
    """Ways of asking one thing and, for each voice, ways of answering it: all patterns."""

    asks: list[str] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=lambda: {voice: [] for voice in VOICES})

    def said_in(self, voice: str) -> list[str]:
        return self.answers[voice] or (self.answers["答"] if voice == "角" else [])


@dataclass
class Topic:
    title: str
    file: str
    weight: float
    drilled: float  # its weight in the drill
    tables: dict[str, list[dict[str, str]]]
    first: Turn = field(default_factory=Turn)
    then: list[Turn] = field(default_factory=list)  # what may be asked next, after the first answer


def read_topics(only: str | None = None) -> list[Topic]:
    """The topics of every file of pieces, or of one. Raises ValueError with file and line."""
    return [topic for path in sorted(PIECES.glob(f"{only or '*'}.txt")) for topic in _read(path)]


def _read(path: Path) -> list[Topic]:
    topics, tables, table, columns = [], {}, None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        try:
            if not line or line.startswith("//"):
                table = None
            elif line.startswith("表"):
                table, *columns = [part.strip() for part in line[1:].split("|")]
                if table in NAMES:
                    raise ValueError("a table may not be called like a slot")
                tables[table] = []
            elif table is not None and line[0] not in "#问追答角古":
                cells = [part.strip() for part in line.split("|")]
                tables[table].append(dict(zip(columns, cells, strict=True)))
            elif line.startswith("#"):
                title, *weights = line[1:].split("*")
                weights = [*map(float, weights)] or [1.0]
                topics.append(Topic(title.strip(), path.stem, weights[0], weights[-1], tables))
                turn, table = topics[-1].first, None
            else:
                kind, pattern = line.split("：", 1)
                check(pattern, tables)
                if kind == "追" and (turn is topics[-1].first or any(turn.answers.values())):
                    turn = Turn()
                    topics[-1].then.append(turn)
                (turn.asks if kind in "问追" else turn.answers[kind]).append(pattern)
        except (ValueError, KeyError, IndexError, UnboundLocalError) as error:
            raise ValueError(f"{path.name}, line {number}: {line!r}: {error}") from None
    for topic in topics:
        for turn in (topic.first, *topic.then):
            if not turn.asks or not any(turn.answers.values()):
                raise ValueError(f"{path.name}, topic {topic.title!r} lacks an ask or an answer")
    return topics


SLOT = re.compile(r"<([^<>.]+)(?:\.([^<>]+))?>")
CHOICE = re.compile(r"\{([^{}]*)\}")  # an innermost one: they nest


def check(pattern: str, tables: dict) -> None:
    """Raise ValueError or KeyError where `pattern` is not closed or names a slot that is not there."""
    bare = pattern
    while CHOICE.search(bare):
        bare = CHOICE.sub("", bare)
    if re.search(r"[{}|]", bare):
        raise ValueError("a { } or | that belongs to nothing")
    for name, column in SLOT.findall(pattern):
        if column:
            tables[name][0][column]
        elif name not in NAMES:
            raise KeyError(name)


def expand(pattern: str, rng: random.Random, slots: dict) -> str:
    """One text of `pattern`: a choice for each ``{a|b}``, the value in `slots` for each ``<slot>``."""
    while CHOICE.search(pattern):
        pattern = CHOICE.sub(lambda m: rng.choice(m[1].split("|")), pattern)
    return SLOT.sub(lambda m: slots[m[1]][m[2]] if m[2] else slots[m[1]], pattern)


# The same thing in other words, in questions alone. Set phrases (怎么样, 晚上好) are left as they are.
OTHER_WORDS = [
    (re.compile(one), other.split("|"))
    for one, other in {
        "怎么办": "咋办|该怎么办|怎么办才好|如何是好|有什么办法",
        "为什么(?![？。呀呢啊]|$)": "为何|为啥|怎么",
        "什么(?!样|的|时|办)": "啥",
        "怎么(?![样了办啦回会不这那也都又总老一])": "怎样|如何",
        "妈妈": "母亲|老妈",
        "爸爸": "父亲|老爸",
        "(?<![得也么])很(?!多|少|久)": "好|非常|特别|挺|真的很",
        "(?<![女男小])孩子": "小孩|娃娃|小朋友",
        "今天": "今日|今儿",
        "晚上(?!好)": "夜里|夜晚",
        "总是": "老是|总|一直",
        "(?<!不)知道": "晓得|清楚",
        "(?<!可)是不是": "是否",
        "可以(?!吗|的)": "能|能够",
    }.items()
]
BEFORE_QUESTION = ["请问，", "你好，", "我想问一下，", "问你个事，", "那个，", "对了，", "我想知道，", "你说，", "那"]  # fmt: skip
BEFORE_REMARK = ["唉，", "哎，", "跟你说，", "对了，", "其实", "那个，", "你知道吗，"]
CALLING = [
    "姐姐",
    "妹妹",
    "姑娘",
    "小姐",
    "夫人",
    "先生",
    "师傅",
    "掌柜的",
    "大人",
    "娘娘",
    "小主",
    "老师",
    "哥哥",
    "公子",
    "母亲",
    "女儿",
    "孩子",
    "嫂子",
]


def asked(pattern: str, rng: random.Random, slots: dict) -> str:
    """A question as people type it: other words, a word before it, a mark or none, rarely a slip."""
    text = expand(pattern, rng, slots)
    for one, others in OTHER_WORDS:
        if rng.random() < 0.25:
            text = one.sub(lambda _, others=others: rng.choice(others), text, count=1)
    mark = text[-1] if text[-1] in "？。！" else ""
    body = text[: len(text) - len(mark)]
    if rng.random() < 0.12:
        body = rng.choice(BEFORE_QUESTION if mark == "？" else BEFORE_REMARK) + body
    if "名" in slots and rng.random() < 0.15:
        body = rng.choice(CALLING) + "，" + body
    if len(body) > 6 and rng.random() < 0.04 and not re.search(r"[\d加减乘除一二三四五六七八九十]", body):  # fmt: skip
        slip = rng.randrange(len(body))
        body = body[:slip] + body[slip + 1 :]
    chance = rng.random()
    return body + (mark if chance < 0.7 else "" if chance < 0.93 else "?" if mark == "？" else "…")


ASSISTANT = [
    "", "", "你是一个乐于助人的智能助手。", "你是一个乐于助人的智能助手", "你是一个智能助手。",
    "你是一个友好的助手，请回答用户的问题。", "请用简短的话回答。", "You are a helpful assistant.",
]  # fmt: skip
ROLE = [
    "现在你要扮演{who}--{name}", "现在你要扮演{who}--{name}", "现在你要扮演{who}--{name}",
    "现在你要扮演{who}——{name}", "现在你要扮演{name}，{who}", "请你扮演{who}，名叫{name}。",
    "你叫{name}，是{who}。", "你是{name}，{who}。", "从现在起，你就是{who}{name}。",
]  # fmt: skip
WHO = [
    "邻居家的姐姐",
    "小学里的老师",
    "街角的面包师",
    "村里的医生",
    "爱唱歌的姑娘",
    "火车上的乘务员",
    "山里的猎人",
    "海边的渔夫",
    "图书馆的管理员",
    "店里的伙计",
    "学校门口的保安",
    "会种花的老人",
    "爱笑的同学",
    "你最好的朋友",
    "远方来的旅人",
    "军营里的将军",
    "城里的裁缝",
    "茶馆里的掌柜",
    "书院里的先生",
    "赶考的书生",
    "卖花的姑娘",
    "江湖上的侠客",
    "山上的道士",
    "寺里的和尚",
    "药铺的大夫",
    "府里的丫鬟",
    "府里的老夫人",
    "大户人家的小姐",
    "将军身边的副将",
    "皇上身边的宫女",
    "皇帝身边的侍卫",
    "太后身边的嬷嬷",
    "王爷府里的夫人",
    "宫里的女官",
    "皇帝的女儿",
    "丞相家的女儿",
    "皇帝身边的女史",
    "御花园的花匠",
    "御膳房的厨娘",
    "宫里的乐师",
    "太子的妃子",
    "皇帝的妹妹",
]
OLD_ROLE = ["，说话要古雅", "，用古人的口气说话", "，说话文雅一些", "，要像古人那样说话"]
OLD_ASK = ["用古雅的口气回答：", "用古人的话回答：", "说得古雅一些：", "请像古人那样回答："]
SURNAMES = "李王张刘陈杨赵黄周吴徐孙胡朱高林何郭马罗梁宋郑谢韩唐冯于董萧程曹袁邓许傅沈曾彭吕苏卢蒋蔡贾丁魏薛叶阎余潘杜戴夏钟汪田任姜范方石姚谭廖邹熊金陆郝孔白崔康毛邱秦江史顾侯邵孟龙万段雷钱汤尹黎易常武乔贺赖龚文欧阳司马上官诸葛"
# The 3,755 characters of GB 2312's first level, by how they are read, and some that names and palaces like.
COMMON = [
    char
    for row in range(0xB0, 0xD8)
    for char in bytes(
        byte for cell in range(0xA1, 0xFF if row < 0xD7 else 0xFA) for byte in (row, cell)
    ).decode("gb2312")
] + list(
    "甄嬛婉婵娥琪瑶璇玥琳璐黛绮翡翠芸芷蕙菀姝妍婧嫣媛熙晟昊玺珏瑾瑜祺筠箐绾胤煜烨妃嫔妾朕婢婕妤钗胭箫髻鬓禀匾鹭莞浣娴翊瑛辇诏懿睿簪"
)
# Those that names are made of in most cases.
NAMING = "安柏白宝贝冰波伯博才采彩灿昌常超朝辰晨成诚承程澄春纯慈翠达大丹道德登笛蝶冬东端恩尔发凡芳飞菲芬风枫峰锋凤福富刚高歌格耕功谷关官光广归贵桂国果海涵寒含翰杭好豪浩禾合和荷鹤恒红宏洪鸿虎花华怀欢焕辉慧惠会吉计继佳家嘉坚建剑健江娇杰洁婕金锦瑾进晋京晶景静镜九久菊娟君俊军凯康可克空宽坤昆兰岚朗乐雷磊蕾莉立力丽利莲廉良亮林琳霖玲灵凌龙隆露鲁路鹿绿伦洛麦满曼茂梅美萌孟梦米勉苗妙敏明铭鸣茉沫墨木牧慕娜楠妮年宁农暖诺欧培佩朋鹏平萍璞七奇琪琦启千倩乔巧芹琴勤青清晴庆秋泉群然人仁忍荣容如儒瑞润若三森沙山珊善尚绍深生声圣诗石时实士世适守寿书淑舒树霜双水顺硕思松素岁太棠涛桃腾天田铁廷亭庭婷同童万望威微薇维伟为文闻雯稳武舞西希夕溪熙曦喜霞夏仙先贤香湘祥翔向晓小笑孝心欣新馨鑫信星行幸雄秀旭轩萱玄雪勋雅言岩妍砚燕阳洋瑶耀野叶一依怡宜以义艺忆毅逸音银英莹影映永勇友有又于余鱼渔宇雨语玉育裕元园圆媛源远月悦跃越云芸允运泽增展章彰昭哲真振正之芝知直志致智中忠钟舟洲珠竹卓子紫自祖左甄嬛婉婵娥璇绮芷菀珏筠绾妃莞"
# And those that places, birds and maids are called by: a word of two of these nobody need know.
CALLED = (
    NAMING
    + "听杏梨柳槐桐莲菱苇蒲蕉蕙芍榴樱藤苔烟虹冰雾涧潭池湖泽汀岸桥台阁楼榭廊院斋堂苑馆舫帆渡磬鼓箫瑟筝弦笔纸画词赋曲棋帘屏灯烛炉茗酒醉眠醒倚凭临观拂沐浣洗采拾折扫挽揽枕漱吟咏唱问寻访寄迎送留待伴邀归来还照染凝披藏隐衔抱停栖宿翔啼鹭鸥雁莺鹂鹊鸾麟龟蝉萤蜂日暮宵夜古今幽闲澈净淡浓疏密浅近低凉细长久喜敬监钦星雀豆墙圆画碧黛红蓝橙"
)
# Names that are hers alone, and words that are nearly hers.
HELD_OUT_WORDS = re.compile("甄嬛|醒木|春杏|听荷|司天监|云鹤|钦天监|白鹭")


def kept_back(name: str) -> bool:
    """Whether `name` is one of the two in a hundred that the base never meets: a test asks for those."""
    return sum(map(ord, name)) % 50 == 0


def made_up_name(rng: random.Random, characters: Sequence[str] = COMMON) -> str:
    """Two to four characters that nobody need bear: copying, not knowing, is what they teach."""
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(SURNAMES) + "".join(rng.choices(characters, k=rng.choice((1, 2, 2))))
    if kind < 0.8:
        return "".join(rng.choices(characters, k=rng.choice((2, 2, 3, 4))))
    if kind < 0.9:
        return rng.choice("小阿老") + rng.choice(characters)
    return rng.choice(SURNAMES) + rng.choice(
        ("先生", "姑娘", "掌柜", "嬷嬷", "大夫", "将军", "夫人", "师傅")
    )


def held_out() -> set[str]:
    """Every question of the exams, normalised: the base must not have met them.

    (Nor those of a sample's validation split: tests/test_data.py composes the corpus and looks.)
    """
    texts = []
    for path in DATA.glob("*questions.json"):
        questions = json.loads(path.read_text(encoding="utf-8"))
        texts += questions["identity"] + questions["daily"]
        texts += [one["question"] for one in questions["general"]]
    for path in DATA.glob("persona_*.json"):
        for fact in json.loads(path.read_text(encoding="utf-8")).get("facts", []):
            texts += fact["ask"]
    for questions in json.loads(READING.read_text(encoding="utf-8")).values():
        texts += questions
    return {normalised(text) for text in texts}


def dialogues(seed: int = 0, only: str | None = None, drill: bool = False) -> Iterator[dict]:
    """Endless dialogues: ``{"system": str, "turns": [(question, answer), ...], "topic": str}``.

    The `drill` asks more for names, facts, sums and a role's own affairs, more in the old voice, and
    names are of fewer characters.
    """
    rng, never = random.Random(seed), held_out()
    topics = read_topics(only)
    weights = [topic.drilled if drill else topic.weight for topic in topics]
    old = [
        weight * bool(topic.first.answers["古"])
        for weight, topic in zip(weights, topics, strict=True)
    ]
    while True:
        characters = NAMING if drill else COMMON
        name, user = made_up_name(rng, characters), made_up_name(rng, characters)
        while kept_back(name):
            name = made_up_name(rng, characters)
        kind = rng.random()
        if kind < 0.4:
            voice, system = "答", rng.choice(ASSISTANT)
        else:
            voice, system = "角", rng.choice(ROLE).format(who=rng.choice(WHO), name=name)
        before = ""
        if rng.random() < (0.35 if drill else 0.22):
            if voice == "角":
                system = system.rstrip("。") + rng.choice(OLD_ROLE)
            else:
                before = rng.choice(OLD_ASK)
            voice = "古"
        slots = {"人": user} if before or voice == "答" else {"人": user, "名": name}
        turns, first = [], None
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
            if first and first.then and rng.random() < 0.6:
                turn, first = rng.choice(first.then), None
            else:
                topic = rng.choices(topics, old if voice == "古" else weights)[0]
                turn, first = topic.first, topic
                slots |= {table: rng.choice(rows) for table, rows in topic.tables.items()}
            said = turn.said_in(voice)
            if not said:
                break
            answer = rng.choice(said)
            if "<名>" in answer and "名" not in slots:
                break
            if "<号>" in answer:
                slots["号"] = "".join(rng.choices(CALLED, k=2))
            ask = before + asked(rng.choice(turn.asks), rng, slots)
            turns.append((ask, expand(answer, rng, slots)))
        texts = [text for pair in turns for text in pair]
        if not turns or any(HELD_OUT_WORDS.search(text) for text in [system, *texts]):
            continue
        if not any(normalised(question) in never for question, _ in turns):
            yield {"system": system, "turns": turns, "topic": topic.title}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--show", type=int, default=20, help="print so many dialogues")
    parser.add_argument("--only", help="of this file of pieces alone, e.g. weather")
    parser.add_argument("--count", type=int, help="compose so many, say how many are different")
    parser.add_argument("--drill", action="store_true", help="those of the second round")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = dialogues(args.seed, args.only, args.drill)
    if args.count:
        drawn = [next(source) for _ in range(args.count)]
        different = {(one["system"], *one["turns"]) for one in drawn}
        pairs = {pair for one in drawn for pair in one["turns"]}
        topics = read_topics(args.only)
        size = sum(path.stat().st_size for path in PIECES.iterdir())
        print(f"{len(topics)} topics, {size / 1e6:.2f} MB of pieces")
        print(f"{len(drawn)} dialogues, {len(different)} different, {len(pairs)} different pairs")
        return
    for _ in range(args.show):
        one = next(source)
        print(f"[{one['topic']}] {one['system'] or '（没有系统提示词）'}")
        for question, answer in one["turns"]:
            print(f"    问 {question}\n    答 {answer}")


if __name__ == "__main__":
    main()
