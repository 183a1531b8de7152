"""Tokenizers made of GGUF vocabularies: the ids and texts of SentencePiece itself."""

import io
import json
import os

import gguf
import pytest
import sentencepiece
from release_helpers import status
from test_gguf_source import STRING, U32, File, settings

from converter.errors import PlanError
from converter.gguf_tokenizer import tokenizer_files
from converter.gguf_tokenizer_child import join_blanks, write

TAGS = ["<think>", "</think>", "<|user|>", "<|end|>", "<|endoftext|>"]
BLANKS = ["\u2581" * count for count in range(2, 6)]
CORPUS = [
    "hello world, hello wide world",
    "the word  of the  world is hello",
    "a   long    line  with     many blanks",
    "\tand then the same words again and again",
] * 20
TEXTS = [
    *("hello world", " hello", "  hello", "   hello", "     hello   world  ", "", " ", "  "),
    *("\n hello", "hello\n\n  world", "hello <think> the </think> word", "a<think>  b", "x  y\t z"),
    *(" <think> a", "a </think>\n\nb", "the </think>", "ü 漢字 😀", "  <think></think>  "),
]


@pytest.fixture(scope="module")
def vocabularies():
    """SentencePiece's own models, with a blank before every text and without."""

    def train(prefix):
        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=made,
            model_type="bpe",
            vocab_size=330,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=prefix,
            user_defined_symbols=[*TAGS, *BLANKS],
            num_threads=1,
            minloglevel=2,
        )
        return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())

    return {prefix: train(prefix) for prefix in (True, False)}


def written(model, file, architecture, *, prefix):
    """The vocabulary as llama.cpp's converter writes it: user-defined blanks as real ones."""
    writer = gguf.GGUFWriter(file, architecture)
    tokens, scores, kinds = [], [], []
    for number in range(model.vocab_size()):
        piece = model.id_to_piece(number)
        kind = 2 if model.is_unknown(number) else 3 if model.is_control(number) else 1
        kind = 6 if model.is_byte(number) else 4 if piece in (*TAGS, *BLANKS) else kind
        tokens.append(piece.replace("\u2581", " ") if kind == 4 else piece)
        scores.append(model.get_score(number))
        kinds.append(kind)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_unk_token_id(model.unk_id())
    if not prefix:  # which is what a file without the setting says
        writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def loaded(folder, kind="llama"):
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("architecture", "kind", "prefix"),
    [("llama", "llama", True), ("llama", "mistral", False), ("gemma2", "gemma2", False)],
)
def test_ids_and_texts_are_sentencepieces(architecture, kind, prefix, vocabularies, tmp_path):
    model = vocabularies[prefix]
    file = written(model, tmp_path / "m.gguf", architecture, prefix=prefix)
    write(str(file), tmp_path)
    made = loaded(tmp_path, kind)
    for text in TEXTS:
        ids = model.encode(text)
        assert made.encode(text, add_special_tokens=False) == ids, text
        assert model.decode(ids) == text
        assert made.decode(ids) == text
        assert made.decode(made.encode(text), skip_special_tokens=True) == text
    # Before a text that begins with a token there is no blank, for transformers and llama.cpp.
    ids = model.encode("<think> the")
    assert made.encode("<think> the", add_special_tokens=False) == ids[1 if prefix else 0 :]


def test_phi_3s_tokens_take_white_space_away(vocabularies, tmp_path):
    """As llama.cpp has it, and the tokenizer of the release; the files do not say so."""
    model = vocabularies[True]
    write(str(written(model, tmp_path / "m.gguf", "phi3", prefix=True)), tmp_path)
    made = loaded(tmp_path, "phi3")

    def pieces(text):
        return model.encode(text, out_type=str)

    for text, expected in (
        ("<|user|>\n  hello<|end|>\n", ["<|user|>", *pieces("hello"), "<|end|>"]),
        ("  hello", pieces("  hello")),
        ("<|endoftext|> a", ["<|endoftext|>", *pieces(" a")]),
    ):
        ids = made.encode(text, add_special_tokens=False)
        assert made.convert_ids_to_tokens(ids) == expected


def test_a_file_larger_than_memory_has_a_tokenizer_too(vocabularies, tmp_path):
    """transformers maps the whole file to read its head; most of this one is a hole."""
    file = written(vocabularies[True], tmp_path / "m.gguf", "llama", prefix=True)
    os.truncate(file, 9 << 30)
    assert "tokenizer.json" in tokenizer_files(file)


def test_blanks_that_the_vocabulary_has_twice_keep_their_ids():
    twice = ["\u2581", "  ", "\u2581\u2581", "   "]
    vocabulary = {"tokens": list(twice), "token_type": [1, 4, 1, 4]}
    join_blanks(vocabulary)
    assert vocabulary == {
        "tokens": [*twice[:3], "\u2581\u2581\u2581"],
        "token_type": [1, 4, 1, 1],
    }


def test_a_vocabulary_that_makes_no_tokenizer_ends_the_run_before_weights(tmp_path, capsys):
    file = File().write(tmp_path / "in" / "m.gguf")
    out = tmp_path / "out"
    assert status("--hf-path", file, "--mlx-path", out, "--no-validate", "--quiet") == 3
    told = capsys.readouterr().err
    assert "m.gguf: its tokenizer cannot be built (KeyError: 'tokens'); put the release's" in told
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_vocabulary_that_takes_forever_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.gguf_tokenizer.TIMEOUT_SECONDS", 0.01)
    file = File(settings(general__architecture=(STRING, "llama"), llama__block_count=(U32, 1)))
    with pytest.raises(PlanError, match=r"m.gguf: its tokenizer cannot be built \(not read within"):
        tokenizer_files(file.write(tmp_path / "m.gguf"))
