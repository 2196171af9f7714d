import html
import re

from huanhuan import show
from huanhuan.prompt import prompt_ids, text_ids


def frames(view: str) -> list[tuple[str, str, str]]:
    """(style, title, text) of every token frame."""
    found = re.findall(r'<span style="([^"]*)" title="([^"]*)">(.*?)<br>', view)
    return [(style, title, html.unescape(text)) for style, title, text in found]


def test_every_token_is_shown_with_its_id_and_label(tokenizer):
    prompt, answer = prompt_ids(tokenizer, "你好"), text_ids(tokenizer, "万福。")
    row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
    shown = frames(show.labelled_tokens(tokenizer, row).data)
    assert len(shown) == len(prompt + answer)
    assert [show.AMBER in style for style, _, _ in shown] == [False] * len(prompt) + [True] * len(
        answer
    )
    for place, (_, title, _) in enumerate(shown):
        assert f"id {row['input_ids'][place]}，label {row['labels'][place]}" in title


def test_a_character_of_several_tokens_is_shown_once(genuine):
    text = "嬛嬛一袅楚宫腰🌸"
    ids = text_ids(genuine, text)
    assert len(ids) > len(text)  # so that there is something to join
    shown = frames(show.labelled_tokens(genuine, {"input_ids": ids, "labels": ids}).data)
    pieces = [piece for _, _, piece in shown]
    assert "".join(piece for piece in pieces if piece != "·") == text
    assert len(pieces) == len(ids) and "\ufffd" not in "".join(pieces)


def test_markup_in_a_dialogue_is_shown_as_text(tokenizer):
    ids = text_ids(tokenizer, "<script>alert(1)</script>")
    view = show.labelled_tokens(tokenizer, {"input_ids": ids, "labels": ids}).data
    assert "<script" not in view
    assert "".join(piece for _, _, piece in frames(view)) == "<script>alert(1)</script>"


def test_differences_are_framed_and_counted(tokenizer):
    same = prompt_ids(tokenizer, "你好")
    assert "两边完全相同" in show.compare_tokens(tokenizer, 训练=same, 提问=same).data
    view = show.compare_tokens(tokenizer, 训练=same, 提问=[same[0], *same]).data
    assert "不同的词元：1 个" in view
    assert sum("dashed" in style for style, _, _ in frames(view)) == 1


def test_figures_keep_their_text_and_say_what_they_show():
    svg = show.token_lengths([30, 40, 50], 384).svg
    assert "一条对话的词元数" in svg and "MAX_LENGTH = 384" in svg
    assert "<title>每条对话的词元数直方图，最长 50，上限 384</title>" in svg
