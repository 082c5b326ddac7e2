"""Training text: cut, held out, streamed, and the orders that the stages read."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny

from posttrain import config, data, text
from posttrain.domains import open_domains
from posttrain.schema import Sample
from posttrain.toy import grading, phrases, sorting, tokenizer

TOKENIZER = tokenizer.build()
DEMO = tiny.demo()
WORDS = "red blue green black white big small old dog cat bird fish house tree sun moon".split()


def _documents(num: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 5 + i % 40)) for i in range(num)]


def _file(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": documents}), path)
    else:
        path.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return path


def _data(*files: Path | str, **fields: Any) -> config.TextData:
    return config.TextData.model_validate({"text": [str(f) for f in files], **fields})


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hf"])
def test_every_document_once_an_epoch_and_no_token_lost(tmp_path: Path, suffix: str) -> None:
    documents = _documents(200)
    if suffix == "hf":
        (tmp_path / "set").mkdir()
        _file(tmp_path / "set" / "train.jsonl", documents)
        uri: Path | str = f"hf://{tmp_path / 'set'}?split=train"
    else:
        uri = _file(tmp_path / f"t.{suffix}", documents)
    kept = [d for d in documents if not text.is_heldout(d)]
    wanted = sum(len(d.split()) + 1 for d in kept)
    stream = text.documents(_data(uri, seq_len=16), TOKENIZER, heldout=False)
    first = list(itertools.takewhile(lambda s: s.id.endswith("#0"), stream))
    assert all(2 <= len(s.tokens) <= 16 and not s.mask[0] and s.mask[1:].all() for s in first)
    # A piece of a single token predicts nothing and is left out.
    single = sum((len(d.split()) + 1) % 16 == 1 for d in kept)
    assert sum(len(s.tokens) for s in first) == wanted - single
    assert len({s.id for s in first}) == len(first)
    assert next(stream).id.endswith("#1")


def test_heldout_documents_are_never_trained_on(tmp_path: Path) -> None:
    file = _file(tmp_path / "t.jsonl", _documents(600))
    held = [s.tokens.tobytes() for s in text.documents(_data(file), TOKENIZER, heldout=True)]
    stream = text.documents(_data(file), TOKENIZER, heldout=False)
    train = {s.tokens.tobytes() for s in itertools.takewhile(lambda s: s.id.endswith("#0"), stream)}
    assert 3 <= len(held) <= 30 and not train & set(held)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{oops", "t.jsonl:2: not valid JSON"), ('{"body": "a"}', "t.jsonl:2: no text in column 'text'")],
)
def test_a_broken_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps({"text": "red cat"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(itertools.islice(text.documents(_data(file), TOKENIZER, heldout=False), 5))


def test_text_with_nothing_in_it_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    file = _file(tmp_path / "t.jsonl", [""])
    with pytest.raises(ValueError, match="no document to train on"):
        next(text.documents(_data(file), TOKENIZER, heldout=False))


def test_chats_train_on_the_assistant_alone(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    chat = [
        {"role": "user", "content": "sort"},
        {"role": "assistant", "content": "answer a b"},
        {"role": "tool", "content": "error"},
        {"role": "assistant", "content": "answer b"},
    ]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    (sample,) = text.chats(file, TOKENIZER)
    words = TOKENIZER.convert_ids_to_tokens(sample.tokens.tolist())
    assert [w for w, m in zip(words, sample.mask, strict=True) if m] == [
        *("answer", "a", "b", "<eos>"),
        *("answer", "b", "<eos>"),
    ]
    file.write_text(json.dumps({"messages": chat[:1]}) + "\n")
    with pytest.raises(ValueError, match=r"chats.jsonl:1: no messages"):
        text.chats(file, TOKENIZER)


def test_chats_of_a_generator_are_streamed() -> None:
    uri = "py://posttrain.toy.grading:verdicts?n=300"
    judge = grading.build()
    settings = config.TextData(chats=[uri], loss_on="assistant")
    stream = data.lm_stream(settings, [], judge, seed=0)
    first = list(itertools.takewhile(lambda s: s.id.endswith("#0"), stream))
    held = list(data.lm_stream(settings, [], judge, seed=0, heldout=True))
    assert len(first) + len(held) == 300 and 1 <= len(held) <= 20
    assert first[0].id.startswith(f"{uri}:") and next(stream).id.endswith("#1")
    for sample in (first[0], held[0]):
        told = judge.decode(sample.tokens[sample.mask])
        (grade,) = json.loads(told.removesuffix("<eos>"))["criteria"]
        assert grade["score"] in (0, 10) and grade["reason"].strip().startswith("the words are")
    with pytest.raises(ValueError, match=r"py://posttrain.toy.grading:verdicts.m=1"):
        next(data.lm_stream(config.TextData(chats=[f"{uri[:-5]}m=1"]), [], judge, seed=0))
    with pytest.raises(ValueError, match="expected a dict, got Task"):
        next(
            data.lm_stream(
                config.TextData(text=["py://posttrain.toy.sorting:tasks?n=1&seed=0"]), [], judge, seed=0
            )
        )


def test_demonstrations_are_repeatable_and_come_from_their_side_of_the_split() -> None:
    domains = list(open_domains(DEMO).values())
    one, two = (list(itertools.islice(data.demonstrations(domains, TOKENIZER, seed=3), 40)) for _ in range(2))
    assert all((a.tokens == b.tokens).all() for a, b in zip(one, two, strict=True))
    assert len({s.id for s in one}) == 40
    unknown = TOKENIZER.unk_token_id
    held = itertools.islice(data.demonstrations(domains, TOKENIZER, seed=3, heldout=True), 400)
    train = itertools.islice(data.demonstrations(domains, TOKENIZER, seed=3), 400)
    asked = [{s.tokens[~s.mask].tobytes() for s in part} for part in (train, held)]
    assert not asked[0] & asked[1]
    assert not any((s.tokens == unknown).any() for s in one), "a word is missing from the vocabulary"


def test_loss_on_all_counts_every_token_but_the_first() -> None:
    domains = list(open_domains(DEMO, ["logic"]).values())
    sample = next(data.lm_stream(config.TextData(), domains, TOKENIZER, seed=0))
    assert sample.mask.sum() == len(sample.tokens) - 1
    assistant = config.TextData(loss_on="assistant")
    assert next(data.lm_stream(assistant, domains, TOKENIZER, seed=0)).mask.sum() < sample.mask.sum()


def test_heldout_counts_targets_beyond_topk() -> None:
    samples = [tiny.sample("a", 10), tiny.sample("b", 20), tiny.sample("c", 20)]
    # b: targets 10 .. 19; with top-k 15 those at 16 .. 19 are predicted from 16 or more keys.
    assert [s.id for s in data.counted(samples, topk=15, at_least=5)] == ["a", "b", "c"]
    assert [s.id for s in data.counted(samples, topk=15, at_least=4)] == ["a", "b"]
    with pytest.raises(ValueError, match="only 8 targets with more than 15 causal keys, 9 wanted"):
        data.counted(samples, topk=15, at_least=9)


def test_domains_take_turns_and_every_row_comes_round() -> None:
    rows = [Sample(id=f"{d}{i}", tokens=np.zeros(2, np.int32), mask=np.array([False, True]), domain=d)
            for d, n in (("a", 5), ("b", 2)) for i in range(n)]  # fmt: skip
    drawn = list(itertools.islice(data.balanced(rows, seed=0), 20))
    assert [s.id[0] for s in drawn] == ["a", "b"] * 10
    assert {s.id for s in drawn if s.domain == "a"} == {f"a{i}#{e}" for i in range(5) for e in range(2)}
    assert len({s.id for s in drawn}) == 20, "an id stands for one use"


def test_toy_demonstrations_are_flawed_as_they_say() -> None:
    import random

    rng = random.Random(0)
    tasks = list(sorting.tasks(seed=1, n=600))
    wrong = sum(f"answer {t.answer}" != sorting.demonstrate(t, rng)[0]["content"] for t in tasks) / 600
    assert 0.3 < wrong < 0.5
    chatter = sum(
        "<think>" in phrases.demonstrate(t, rng)[0]["content"] for t in phrases.tasks(seed=1, n=600)
    )
    assert chatter / 600 == pytest.approx(phrases.CHATTER, abs=0.06)
