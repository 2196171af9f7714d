"""The ground floor's window: figures, token view, tables, the upload button."""

import contextlib
import difflib
import html
import io
import logging
import os
import random
import re
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML

from huanhuan.course import RANK, Course, CourseError, writing

BLUE, ORANGE, AMBER, GREY = "#0072b2", "#d55e00", "#e69f00", "#888888"  # safe for the colour-blind

# SVG keeps text as text: the reader's browser draws it, so that Chinese needs no font on the
# machine that runs the notebook. The names are those of the usual systems.
FONTS = [
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "WenQuanYi Micro Hei",
    "DejaVu Sans",
]
STYLE = {
    "font.family": FONTS, "svg.fonttype": "none", "axes.unicode_minus": False, "axes.spines.top": False,
    "axes.spines.right": False, "figure.figsize": (7.5, 3.2), "font.size": 11, "figure.constrained_layout.use": True,
}  # fmt: skip


class Figure:
    """A finished figure: Jupyter shows it as SVG; `svg` is its text."""

    def __init__(self, figure, alt: str):
        buffer = io.StringIO()
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # the browser has the characters
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": alt})
        plt.close(figure)
        self.svg = buffer.getvalue()

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: Path) -> None:
        """Write the SVG. Of several processes, only the first does."""
        if RANK == 0:
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(self.svg, encoding="utf-8")


def _axes():
    # A missing font is no fault here: the text is drawn by the browser.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    return plt.subplots()


def token_lengths(lengths: list[int], max_length: int) -> Figure:
    """Histogram of tokens a row, with `max_length` drawn in."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.hist(lengths, bins=40, color=BLUE)
        axes.axvline(max_length, color=ORANGE, linewidth=2)
        axes.text(
            max_length,
            axes.get_ylim()[1] * 0.95,
            f" MAX_LENGTH = {max_length} ",
            color=ORANGE,
            ha="right",
            va="top",
        )
        axes.set(
            xlabel="一条对话的词元数", ylabel="条数", xlim=(0, max(max_length, *lengths) * 1.04)
        )
    return Figure(figure, f"每条对话的词元数直方图，最长 {max(lengths)}，上限 {max_length}")


def loss_curve(history: list[dict], before: float | None = None) -> Figure:
    """Training and held-out loss over steps.

    `history` is ``trainer.state.log_history``; `before` the held-out loss at step 0.
    """
    train = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not train:
        raise CourseError("还没有训练过，没有曲线可画：请先运行训练那一格（trainer.train）。")
    held = ([(0, before)] if before is not None else []) + [
        (e["step"], e["eval_loss"]) for e in history if "eval_loss" in e
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.plot(*zip(*train, strict=True), color=BLUE, label="训练集 train")
        if held:
            axes.plot(*zip(*held, strict=True), color=ORANGE, marker="o", label="验证集 eval")
            for place in held:  # the turn may be too small to be seen
                axes.annotate(
                    f"{place[1]:.3f}", place, (0, 7), textcoords="offset points", ha="center"
                )
        axes.set(xlabel="步 step", ylabel="损失 loss")
        axes.margins(y=0.15)
        axes.legend(frameon=False)
    return Figure(
        figure,
        f"损失曲线：训练集最后 {train[-1][1]:.2f}"
        + (f"，验证集最后 {held[-1][1]:.2f}" if held else ""),
    )


def shares(over: list[float], scores: dict[str, list[tuple[int, int]]], interval, xlabel: str):
    """A Figure: shares of right answers, each as (right, asked), over what was changed.

    ``interval(right, asked)`` gives the two ends of an error bar.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        for colour, (name, counts) in zip((BLUE, ORANGE), scores.items(), strict=False):
            found = [right / asked for right, asked in counts]
            low, high = zip(*(interval(*count) for count in counts), strict=True)
            axes.plot(over, found, color=colour, marker="o", label=name)
            axes.vlines(over, low, high, color=colour, alpha=0.5)
        axes.set(xlabel=xlabel, ylabel="答对的比例", ylim=(0, 1.02), xticks=over)
        axes.legend(frameon=False)
    said = "；".join(f"{n} {c[0][0]} → {c[-1][0]}，共 {c[0][1]}" for n, c in scores.items())
    return Figure(figure, f"{xlabel}从 {over[0]:g} 到 {over[-1]:g}，答对：{said}")


def best_epoch(history: list[dict]) -> str:
    """In which epoch the held-out loss was lowest, and what that says, in a sentence.

    `history` is ``trainer.state.log_history``.
    """
    held = [*{e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}.values()]
    if len(held) < 2:
        return "验证集只考过一次，看不出是不是过拟合。"
    best = held.index(min(held))
    if best == len(held) - 1:
        return f"验证集最后一轮（第 {len(held)} 轮）最低，{held[-1]:.3f}：还看不到过拟合。"
    return (
        f"验证集第 {best + 1} 轮最低，{held[best]:.3f}；最后一轮又回升了 {held[-1] - held[best]:.3f}：过拟合开始了。"
        f"存下来的是最后一轮的，下次可以改成 Course.start(epochs={best + 1})。"
    )


def chances(tokenizer, said, before: list[float], after: list[float] | None = None) -> Figure:
    """Bars of the chance that each token `said` (ids) has, first, and after a few steps."""
    words = [tokenizer.decode([i]) for i in said]
    with matplotlib.rc_context(STYLE | {"figure.figsize": (7.5, 2.6)}):
        figure, axes = _axes()
        places = range(len(words))
        if after is not None:
            axes.bar(places, after, color=ORANGE, label="走了几步以后")
        axes.bar(places, before, color=BLUE, width=0.5 if after else 0.8, label="一开始")
        axes.set(xticks=places, ylim=(0, 1.05), ylabel="概率")
        axes.set_xticklabels(words, rotation=0 if len(words) < 25 else 60)
        if after is not None:
            axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    shown = "，".join(f"{word} {chance:.0%}" for word, chance in zip(words, before, strict=True))
    return Figure(figure, f"她说的每个词元的概率：{shown}")


def attention_mask(batch: dict) -> Figure:
    """Which token sees which, of a packed batch: its 4-D mask (1, 1, S, S) as a picture."""
    sees = batch["attention_mask"][0, 0] == 0
    size = len(sees)
    with matplotlib.rc_context(STYLE | {"figure.figsize": (4.6, 4.6)}):
        figure, axes = _axes()
        axes.imshow(
            sees, cmap=matplotlib.colors.ListedColormap(["#f2f2f2", BLUE]), interpolation="nearest"
        )
        axes.set(xlabel="被看的词元", ylabel="正在看的词元")
    return Figure(figure, f"{size} 个词元的注意力掩码：共同的开头，之后每条对话只看得见自己")


def memory(needs: dict, free: float, peak: float | None = None) -> Figure:
    """Stacked bars of the memory that each way to split a step needs, against what is free.

    `needs` is {a name: {a part: GiB}}, `free` GiB; `peak`, if given, is what was used in the end.
    """
    names = [str(name) for name in needs]
    most = max(sum(parts.values()) for parts in needs.values())
    limit = max(most, peak or 0) * 1.15
    with matplotlib.rc_context(STYLE | {"figure.figsize": (7.5, 1.4 + 0.35 * len(names))}):
        figure, axes = _axes()
        left = [0.0] * len(names)
        colours = (BLUE, AMBER, "#56b4e9", "#009e73")
        for part, colour in zip(next(iter(needs.values())), colours, strict=True):
            widths = [parts[part] for parts in needs.values()]
            axes.barh(names, widths, left=left, color=colour, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, total in enumerate(left):
            axes.text(total + limit * 0.01, row, f"{total:.2f}", va="center", fontsize=9)
        if free < 2 * limit:
            limit = max(limit, free * 1.1)
            axes.axvline(free, color=ORANGE, linewidth=2)
        if peak is not None:
            axes.axvline(peak, color="black", linestyle="--", label=f"实际峰值 {peak:.2f}")
        axes.set(xlabel=f"GiB（这台机器现在可用 {free:.1f} GiB）", xlim=(0, limit))
        axes.invert_yaxis()
        handles, _ = axes.get_legend_handles_labels()  # lines come first, whenever they were drawn
        handles = handles if peak is None else [*handles[1:], handles[0]]
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        axes.legend(handles=handles, frameon=False, ncols=5, fontsize=9, **place)
    said = "，".join(f"{name} 需要 {total:.2f}" for name, total in zip(names, left, strict=True))
    return Figure(figure, f"显存或内存估计，GiB：{said}；可用 {free:.1f}")


_TOKEN = (
    "display:inline-block;padding:0 3px;line-height:1.35;text-align:center;white-space:pre;"
    f"border:1px solid {GREY};"
)
_LABELLED = f"background:{AMBER};color:black;"  # black on amber is read in light and dark mode
_DIFFERENT = f"border:2px dashed {ORANGE};font-weight:bold;"


def _pieces(tokenizer, ids: list[int]) -> list[tuple[str, bool]]:
    """The text of every token, and whether it belongs to the same character as the one before.

    A character that is spread over several tokens stands at the first of them; the others are
    ``·``.
    """
    pieces, held = [], 0
    for position in range(len(ids)):
        whole = tokenizer.decode(ids[held : position + 1])
        if "\ufffd" in whole and position + 1 < len(ids):
            continue  # the bytes so far are no whole character yet
        pieces += [(whole, False)] + [("·", True)] * (position - held)
        held = position + 1
    return pieces


def _token_frames(tokenizer, ids: list[int], styles: list[str], titles: list[str]) -> str:
    """HTML: a frame a token with its text above its id; the tokens of one character hang together."""
    frames = []
    for (piece, joined), token, style, title in zip(
        _pieces(tokenizer, ids), ids, styles, titles, strict=True
    ):
        shown = piece.replace(" ", "␣") if piece.isspace() else piece
        shown = html.escape(shown).replace("\n", "↵")
        gap = "margin:2px 0 2px -1px;" if joined else "margin:2px 0 2px 3px;"
        number = f'<span style="font-size:9px;opacity:.7">{token}</span>'
        frames.append(
            f'<span style="{_TOKEN}{gap}{style}" title="{title}">{shown}<br>{number}</span>'
        )
    return f'<div style="font-family:{",".join(FONTS)},sans-serif">{"".join(frames)}</div>'


def labelled_tokens(tokenizer, row: dict[str, list[int]]) -> HTML:
    """Every token of one row in a frame, its id below; those that carry a label on amber.

    `row` has ``input_ids`` and ``labels`` of the same length. Plain HTML: place, id and label of
    a token are also said when the mouse rests on it.
    """
    ids, labels = row["input_ids"], row["labels"]
    styles = ["" if label == -100 else _LABELLED for label in labels]
    titles = [
        f"第 {place} 个词元，id {token}，label {label}"
        for place, (token, label) in enumerate(zip(ids, labels, strict=True), 1)
    ]
    taught = sum(label != -100 for label in labels)
    caption = (
        f"黄底：带标签、参与计算损失的 {taught} 个词元；没有底色：只给模型看的 {len(ids) - taught} 个。"
        "字下面的小数字是编号；“·”与前面的词元合起来才是一个字，“␣”是空格，“↵”是换行。"
    )
    return HTML(f"<p>{caption}</p>" + _token_frames(tokenizer, ids, styles, titles))


def compare_tokens(tokenizer, **sides: list[int]) -> HTML:
    """Two token sequences one above the other, what differs in a dashed frame.

    `sides` are two named lists of ids, e.g. ``compare_tokens(tokenizer, 训练=a, 提问=b)``.
    """
    (first, a), (second, b) = sides.items()
    same = difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_matching_blocks()
    parts, different = [], 0
    for name, ids, starts in ((first, a, [m.a for m in same]), (second, b, [m.b for m in same])):
        equal = {
            i for start, m in zip(starts, same, strict=True) for i in range(start, start + m.size)
        }
        different += len(ids) - len(equal)
        styles = ["" if i in equal else _DIFFERENT for i in range(len(ids))]
        titles = [f"第 {place} 个词元，id {token}" for place, token in enumerate(ids, 1)]
        parts.append(f"<p><b>{html.escape(name)}</b>（{len(ids)} 个词元）</p>")
        parts.append(_token_frames(tokenizer, ids, styles, titles))
    verdict = f"不同的词元：{different} 个，用虚线框标出。" if different else "两边完全相同。"
    return HTML("".join(parts) + f"<p>{verdict}</p>")


_WORDS = {  # of verdicts that are not to be overlooked
    "提醒": f"background:{AMBER};color:black;",
    "不行": f"background:{ORANGE};color:white;font-weight:bold;",
    "不能用": f"background:{ORANGE};color:white;font-weight:bold;",
}


def table(frame: pd.DataFrame) -> HTML:
    """A table of texts: wrapped, left- and top-aligned, without the index; warnings in colour."""
    style = "text-align:left;vertical-align:top;padding:4px 10px;white-space:pre-wrap;"
    head = "".join(f'<th style="{style}">{html.escape(str(name))}</th>' for name in frame.columns)
    cells = (
        "".join(
            f'<td style="{style}{_WORDS.get(str(v), "")}">{html.escape(str(v))}</td>' for v in row
        )
        for row in frame.to_numpy()
    )
    body = "".join(f"<tr>{row}</tr>" for row in cells)
    return HTML(
        f'<table style="width:100%"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def file_picker(course: Course, check: Callable[[Path], pd.DataFrame]):
    """An upload button. A file that `check` accepts is copied to ``uploads/`` of the run directory.

    `check` gets the path of a temporary copy and returns its rows, with what is to be said of them
    in ``attrs["report"]``, or raises CourseError for a bad file, whose message is shown instead;
    nothing is written then. An earlier upload of the same name is renamed.
    """
    try:
        import ipywidgets
    except ImportError:
        print(
            "没有 ipywidgets，显示不了上传按钮：用左侧文件栏上传，再在“读入数据集”那一格里写上文件的路径。"
        )
        return None

    button = ipywidgets.FileUpload(
        description="选择数据集", accept=".json,.jsonl,.csv,.tsv,.txt", multiple=False
    )
    button.tooltip = "上传你自己的数据集；不上传，就用课程自带的样例"

    def in_force() -> str:
        if named := os.environ.get("HUANHUAN_DATA"):
            return Path(named).name
        return course.uploads[-1].name if course.uploads else "课程自带的样例"

    said = ipywidgets.HTML(f"不上传也可以，“读入数据集”那一格会用：{html.escape(in_force())}。")

    def receive(change) -> None:
        value = change["new"]
        if not value:
            return
        # ipywidgets 7 (Colab) gives {name: {"content": bytes}}, 8 a tuple of {"name", "content"}.
        name, file = (
            next(iter(value.items())) if isinstance(value, dict) else (value[0]["name"], value[0])
        )
        # Neither hidden nor a path, nor too long for a disk.
        name = re.sub(r"[^\w.()（） -]", "_", Path(name).name).lstrip(".")[-60:] or "data"
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / name
            copy.write_bytes(bytes(file["content"]))
            try:
                rows = check(copy)
                with course.replacing(course.run_dir / "uploads" / name) as target:
                    shutil.copy(copy, target)
            except CourseError as error:
                said.value = (
                    f"<pre>⛔ {html.escape(str(error))}</pre>"
                    f"没有收下这个文件，用的仍然是：{html.escape(in_force())}。"
                )
                button.set_trait("value", type(button.value)())  # it is counted no more
                return
        notes = "".join(f"<br>· {html.escape(note)}" for note in rows.attrs["report"])
        said.value = (
            f"✅ 收到 {html.escape(name)}，共 {len(rows)} 条对话。{notes}<br>"
            "选中这一格，点菜单 运行 → 运行选中的单元格及以下所有 / Run → Run Selected Cell and All Below，后面的就都用它。"
        )

    button.observe(receive, names="value")
    return ipywidgets.VBox([button, said])


_BUBBLE = "margin:4px 0;padding:6px 10px;border-radius:8px;white-space:pre-wrap;color:black;"
# A column from below: the box stays scrolled to the newest line.
_LOG = "max-height:380px;overflow-y:auto;display:flex;flex-direction:column-reverse;"


def chat(session, name: str, sampling: dict):
    """A conversation as widgets; `session` is an ``infer.Chat``, `sampling` the sliders' defaults.

    Words appear as they are generated; that happens in a thread, so that the stop button works.
    Everything said is shown as text, never as markup.
    """
    try:
        import ipywidgets
    except ImportError:
        print("没有 ipywidgets：运行 chat.loop()，用最简单的方式聊。")
        return None

    def slider(label: str, key: str, low: float, high: float, step: float):
        kind = ipywidgets.IntSlider if isinstance(sampling[key], int) else ipywidgets.FloatSlider
        return kind(value=sampling[key], min=low, max=high, step=step, description=label)

    log = ipywidgets.HTML()
    said = ipywidgets.HTML("在上面输入一句话，按回车。")
    wide = ipywidgets.Layout(width="100%")
    text = ipywidgets.Textarea(placeholder="对她说点什么，按回车发送", rows=2, layout=wide)
    who = ipywidgets.ToggleButtons(options=[(f"微调后（{name}）", True), ("微调前", False)])
    send, stop, new, save = (
        ipywidgets.Button(description=label) for label in ("发送", "停下", "新的对话", "保存对话")
    )
    stop.disabled = True
    knobs = {
        "temperature": slider("温度", "temperature", 0.1, 2.0, 0.1),
        "top_p": slider("top_p", "top_p", 0.1, 1.0, 0.05),
        "repetition_penalty": slider("重复惩罚", "repetition_penalty", 1.0, 2.0, 0.05),
        "max_new_tokens": slider("最多词元", "max_new_tokens", 8, 512, 8),
    }

    def bubble(speaker: str, words: str, colour: str) -> str:
        words = html.escape(words) or "……"
        return f'<div style="{_BUBBLE}background:{colour}"><b>{html.escape(speaker)}</b>　{words}</div>'

    def draw(question: str | None = None, reply: str = "") -> None:
        turns = session.turns + ([(question, reply)] if question else [])
        tuned = dict(enumerate(session.sides))
        bubbles = ""
        for place, (asked, answer) in enumerate(turns):
            hers = tuned.get(place, session.tuned)  # the turn that is growing has no side yet
            bubbles += bubble("你", asked, "#e8e8e8")
            bubbles += bubble(name if hers else "微调前", answer, "#fbe3b5" if hers else "#dbe7f0")
        log.value = f'<div style="{_LOG}"><div>{bubbles}</div></div>' if turns else ""

    def busy(yes: bool) -> None:
        stop.disabled = not yes
        for button in (send, new, save, who):
            button.disabled = yes

    def talk(question: str) -> None:
        try:
            settings = {key: knob.value for key, knob in knobs.items()}
            for reply in session.say(question, **settings):
                draw(question, reply)
            draw()
            cut = bool(session.turns) and session.turns[-1][0] != question
            said.value = "这句话太长，放不下：中间删去了一段，只给她看了前后两头。" if cut else ""
        except Exception as error:  # in a thread nobody else would see it
            said.value = f"⛔ {html.escape(str(error))}"
        finally:
            busy(False)

    def on_send(_) -> None:
        question = text.value.strip()
        if not question:
            text.value, said.value = "", "还没有输入。"
            return
        session.tuned, text.value, said.value = who.value, "", "正在想……"
        busy(True)
        draw(question)
        threading.Thread(target=talk, args=(question,), daemon=True).start()

    def on_new(_) -> None:
        session.new()
        said.value = "新的对话。"
        draw()

    def on_save(_) -> None:
        try:
            words = io.StringIO()  # what a button's callback prints is shown nowhere
            with contextlib.redirect_stdout(words):
                path = session.save()
            said.value = html.escape(f"存到了 {path}，格式与数据集相同。{words.getvalue().strip()}")
        except CourseError as error:
            said.value = f"⛔ {html.escape(str(error))}"

    def on_enter(change) -> None:  # an input method's own Enter writes no line end
        if change["new"].endswith("\n") and not send.disabled:
            on_send(None)

    send.on_click(on_send)
    text.observe(on_enter, names="value")
    stop.on_click(lambda _: session.stop())
    new.on_click(on_new)
    save.on_click(on_save)
    buttons = ipywidgets.HBox([send, stop, new, save])
    return ipywidgets.VBox([who, log, text, buttons, said, ipywidgets.VBox(list(knobs.values()))])


def blind(rows: pd.DataFrame, share: Callable[[int, int], str]):
    """A game: of two answers to each question, which is the tuned model's? Two buttons, no key to see.

    `rows` has the columns ``question``, ``base`` and ``tuned``; pairs that are equal are left out. The
    order is drawn anew every time. `share` writes k of n. Without ipywidgets: None, and a sentence.
    """
    try:
        import ipywidgets
    except ImportError:
        print("没有 ipywidgets，显示不了按钮：请先运行 pip install ipywidgets，再重启内核。")
        return None
    left = list(rows[rows["base"] != rows["tuned"]].itertuples())
    chosen: list[bool] = []
    card, said = ipywidgets.HTML(), ipywidgets.HTML()
    buttons = [ipywidgets.Button(description=f"{name}更像她") for name in "甲乙"]
    tuned_first = False

    def deal() -> None:
        nonlocal tuned_first
        tuned_first = random.random() < 0.5
        row = left[len(chosen)]
        answers = (row.tuned, row.base) if tuned_first else (row.base, row.tuned)
        told = [f"<b>{html.escape(row.question)}</b>"]
        told += [f"{name}：{html.escape(text)}" for name, text in zip("甲乙", answers, strict=True)]
        card.value = f"{len(chosen) + 1} / {len(left)}<br>" + "<br>".join(told)

    def pick(button) -> None:
        chosen.append((button is buttons[0]) == tuned_first)
        if len(chosen) < len(left):
            return deal()
        for one in buttons:
            one.disabled = True
        said.value = f"选了微调后的：{share(sum(chosen), len(chosen))}。区间里有 50%，就还说不准。"

    for button in buttons:
        button.on_click(pick)
    if left:
        deal()
    return ipywidgets.VBox([card, ipywidgets.HBox(buttons), said])


def layer_norms(norms: pd.DataFrame) -> Figure:
    """How much the adapter changed every matrix: one square a layer and matrix, darker is more."""
    with matplotlib.rc_context(STYLE | {"figure.figsize": (7.5, 1.6 + 0.22 * len(norms))}):
        figure, axes = _axes()
        image = axes.imshow(norms.to_numpy(), cmap="Blues", vmin=0, aspect="auto")
        axes.set_xticks(range(norms.shape[1]), norms.columns)
        axes.set_yticks(range(len(norms)), norms.index)
        axes.set(ylabel="层 layer")
        figure.colorbar(image, ax=axes, label="变化 ÷ 原来（范数）")
    return Figure(figure, "适配器让每一层的每个矩阵变了多少，颜色越深变得越多")
