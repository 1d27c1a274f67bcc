"""Words of a text and the tokens that stand for them: nothing is lost, nothing is moved."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from engine.answers._texts import limit
from engine.answers._words import between_spaces, encode, joined, keep_spaces, overlap, split

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab 北京é\u0301\u200d👩🚀\ufe0f🇩🇪\u200b.,-5"))
)


def shown(text):
    words = split(text)
    return [words.word(index) for index in range(len(words.places))]


@given(TEXTS)
def test_words_hold_every_character_but_white_space_once_and_in_order(text):
    words, end = split(text), 0
    for start, stop in words.places:
        assert start >= end and stop > start and not text[end:start].strip()
        end = stop
    assert not text[end:].strip()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, wörld!", ["Hello", ",", "wörld", "!"]),
        ("e\u0301tude na\u00efve", ["e\u0301tude", "na\u00efve"]),
        ("北京ABC大学", ["北", "京", "ABC", "大", "学"]),
        ("CPL2011 2.5%", ["CPL", "2011", "2", ".", "5", "%"]),
        ("हिन्दी", ["हिन्दी"]),
        ("👩‍🚀👍🏽!", ["👩‍🚀", "👍🏽", "!"]),
        ("𝒜𝒷 𐐷", ["𝒜𝒷", "𐐷"]),
        ("New\u200bYork", ["New\u200bYork"]),
        ("ภาษา", ["ภ", "า", "ษ", "า"]),
        ("한국어 조사", ["한국어", "조사"]),
        ("", []),
        (" \n\t\u3000", []),
    ],
)
def test_words_are_what_can_be_an_entity_of_its_own(text, words):
    assert shown(text) == words


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=5))
def test_given_words_stand_in_their_text_with_a_space_between_them(words):
    made = joined(words)
    assert made.text == " ".join(words)
    assert [made.word(index) for index in range(len(words))] == words


def test_a_text_that_comes_with_tags_has_its_words_between_spaces():
    words = between_spaces("It 's  10%\u00a0off")
    assert [words.word(index) for index in range(len(words.places))] == ["It", "'s", "10%", "off"]


def letters(max_length, stride):
    """A tokenizer with a token for every letter; signs of format become none."""
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{chr(97 + i): 4 + i for i in range(26)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    limit(tokenizer, max_length, "[PAD]")
    overlap(tokenizer, stride)
    return tokenizer


WORDS = st.lists(st.text("abcxyz\u200b", min_size=1, max_size=9), max_size=40)


@settings(max_examples=150, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=3), st.integers(4, 12), st.data())
def test_every_word_with_a_token_is_read_once_at_its_first_token_in_the_window_with_most_around_it(texts, length, data):
    stride = data.draw(st.integers(0, length - 3))
    tokenizer = letters(length, stride)
    for words, encoded in zip(texts, encode(tokenizer, [joined(words) for words in texts]), strict=True):
        visible = [index for index, word in enumerate(words) if word.strip("\u200b")]
        assert encoded.word_V.tolist() == visible
        assert (np.diff(encoded.window_V) >= 0).all(), "windows share words out in order"
        for word, window, place in zip(encoded.word_V, encoded.window_V, encoded.position_V, strict=True):
            own = encoded.windows[window]
            assert own.ids[place] == tokenizer.token_to_id(words[word].strip("\u200b")[0])
            assert own.word_ids[place] == word


def test_a_text_that_fits_has_one_window_and_longer_ones_share_their_overlap():
    tokenizer = letters(8, 2)
    short, long = encode(tokenizer, [joined(["abc", "de", "f"]), joined(list("abcdefghijklm"))])
    assert len(short.windows) == 1 and short.position_V.tolist() == [1, 4, 6]
    tokens = [[token for token in window.tokens if not token.startswith("[")] for window in long.windows]
    assert ["".join(part) for part in tokens] == ["abcdef", "efghij", "ijklm"]
    assert "".join(str(window) for window in long.window_V) == "0000011112222", "each where it has most tokens on its nearer side"


def sentencepiece(*before):
    """A tokenizer as SentencePiece's are converted: a sign of the space before every word."""
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("▁", -2.0), *((piece, -1.0) for piece in ("▁a", "b", "北", "京", "▁北", "ab"))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    if before:
        tokenizer.normalizer = normalizers.Sequence(list(before))
    limit(tokenizer, 16, "<pad>")
    overlap(tokenizer, None)
    keep_spaces(tokenizer)
    return tokenizer


def test_a_space_is_marked_only_where_one_stands():
    (encoded,) = encode(sentencepiece(), [split("a 北京 b")])
    assert encoded.windows[0].tokens == ["▁a", "▁北", "京", "▁", "b"]
    assert encoded.word_V.tolist() == [0, 1, 2, 3]


def test_a_tokenizer_that_strips_spaces_first_stays_as_it_is():
    (encoded,) = encode(sentencepiece(normalizers.Strip()), [split("a 北京")])
    assert encoded.windows[0].tokens == ["▁a", "▁北", "▁", "京"]


@pytest.mark.parametrize("text", ["Hello world, it", "naïve 北京 x  y", " a"])
def test_words_of_a_byte_level_tokenizer_get_the_tokens_that_they_have_in_the_text(text):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    limit(tokenizer, 64, "a")
    overlap(tokenizer, None)
    keep_spaces(tokenizer)
    (encoded,) = encode(tokenizer, [split(text)])
    single = " ".join(text.split()) if text[0] != " " else f" {text.strip()}"
    assert encoded.windows[0].tokens == tokenizer.encode(single).tokens


def test_windows_that_cannot_overlap_so_far_are_refused():
    with pytest.raises(ValueError, match="windows of 8 tokens cannot share 6: stride must be below 6"):
        letters(8, 6)
