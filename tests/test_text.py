"""Texts: their models, vocabularies and data sets, and the accuracy of an output at every position."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import onward
from onward.evidence.fitting import check_classifies
from onward.models import Dataset, build, build_for, load
from onward.models.data import ag_news
from onward.models.data.python_docs import LENGTH, next_token_loss, topics
from onward.models.data.surnames import LOCALES, OF_A_LANGUAGE
from onward.models.data.text import PADDING, UNKNOWN, Vocabulary
from onward.passes.errors import BatchError, CaptureError, DataError, OptionError
from onward.runtime.training.evaluation import accuracy

CLASSIFIERS = ("rnn_text", "gru_text", "lstm_text")

# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_padding_changes_nothing(name: str, layers: int) -> None:
    torch.manual_seed(0)
    model = build(name, num_tokens=9, num_classes=3, layers=layers)
    text = torch.randint(1, 9, (4, 5))
    plain = model(text)
    assert plain.shape == (4, 3)
    torch.testing.assert_close(model(F.pad(text, (7, 0))), plain)
    assert not torch.allclose(model(text.flip(1)), plain, atol=1e-3)


def test_a_gpt_sees_what_came_before_only() -> None:
    torch.manual_seed(0)
    model = build("gpt", num_tokens=9, length=6, width=8)
    text = torch.randint(0, 9, (2, 6))
    logits, changed = model(text), text.clone()
    assert logits.shape == (2, 6, 9)
    changed[:, 3] = (changed[:, 3] + 1) % 9
    differs = (model(changed) - logits).abs().amax((0, 2)) > 1e-4
    assert differs.tolist() == [False] * 3 + [True] * 3
    torch.testing.assert_close(model(text[:, :4]), logits[:, :4])
    with pytest.raises(BatchError, match="a text of 7 tokens; this one is for up to 6"):
        model(torch.zeros(2, 7, dtype=torch.int64))


@pytest.mark.parametrize("name", [*CLASSIFIERS, "gpt"])
def test_what_is_no_text_is_refused(name: str) -> None:
    model = build(name, width=4)
    for wrong in (torch.zeros(2, 5), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 5, 3, dtype=torch.int64)):
        with pytest.raises(BatchError, match=r"whole numbers of shape .* a length of at least 1"):
            model(wrong)
    if name == "gru_text":
        with pytest.raises((BatchError, CaptureError), match="a length of at least 1"):
            onward.compile(model, (torch.zeros(2, 0, dtype=torch.int64),), loss=F.cross_entropy)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(OptionError, match="at least 1, not 64, 32, 0 and 1"):
        build("gru_text", hidden=0)
    with pytest.raises(OptionError, match="at least 1, not 0 and 16"):
        build("gpt", num_tokens=0)
    with pytest.raises(OptionError, match="heads must divide width"):
        build("gpt", heads=3)


def test_a_compiled_classifier_leaves_the_paddings_vector_at_zero() -> None:
    torch.manual_seed(0)
    model = build("rnn_text", num_tokens=6, num_classes=3, width=4, hidden=5)
    text, classes = F.pad(torch.randint(1, 6, (6, 1)), (1, 0)), torch.arange(6) % 3
    estimator = onward.LikelihoodRatio.feedback_learned(copies=2, reach=0, warmup=1)
    program = onward.compile(model, (text,), loss=F.cross_entropy, estimator=estimator)
    for _ in range(3):
        model.zero_grad()
        program.step(text, classes)
    gradient = model.get_parameter("embed.weight").grad
    assert gradient is not None
    assert not gradient[PADDING].any()
    assert gradient[1:].any()
    with pytest.raises(BatchError):
        program.step(text.float(), classes)


# --- accuracy at every position ---------------------------------------------------------------------------------------


def test_accuracy_of_tokens() -> None:
    target = torch.tensor([[0, 1, 2], [3, 3, 0]])
    scores = F.one_hot(torch.tensor([[0, 1, 0], [3, 3, 0]]), 4).float()
    assert accuracy(scores, target).tolist() == pytest.approx([2 / 3, 1])
    assert accuracy(scores.transpose(1, 2), target).tolist() == pytest.approx([2 / 3, 1])
    with pytest.raises(OptionError, match=r"\(N, C, …\) or \(N, …, C\)"):
        accuracy(scores, target[:, :2])


# --- vocabularies -----------------------------------------------------------------------------------------------------


def test_a_vocabulary_numbers_the_frequent_first_and_pads_in_front() -> None:
    vocabulary = Vocabulary.of(["abcab", "ab"], at_least=2)
    assert vocabulary.pieces == ("a", "b")
    assert len(vocabulary) == 4
    tokens = vocabulary.encode(["abc", "", "babab"], 4)
    assert tokens.tolist() == [[PADDING, 2, 3, UNKNOWN], [PADDING] * 4, [3, 2, 3, 2]]
    assert vocabulary.decode(tokens[0]) == ["a", "b", "�"]
    assert Vocabulary.of(["aab", "c"], at_most=1).pieces == ("a",)


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surnames() -> Dataset:
    pytest.importorskip("faker", reason="needs the extra 'text'")
    return load("surnames")


@pytest.fixture(scope="module")
def python_docs() -> Dataset:
    return load("python-docs")


def rows(tokens: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in tokens}


def test_surnames_are_texts_of_one_language_each(surnames: Dataset) -> None:
    (train, train_classes), (test, test_classes) = surnames.train.tensors, surnames.test.tensors
    assert train.dtype == train_classes.dtype == torch.int64
    assert surnames.input_shape == tuple(train.shape[1:]) == (12,)
    assert (surnames.num_classes, surnames.num_features) == (len(LOCALES), 12)
    assert int(train.max()) < surnames.num_tokens
    assert not (test == UNKNOWN).all(1).any()
    assert len(rows(train)) == len(train)
    assert not rows(train) & rows(test[(test != UNKNOWN).all(1)])
    counts = torch.bincount(train_classes) + torch.bincount(test_classes)
    assert int(counts.max()) == OF_A_LANGUAGE
    assert int(counts.min()) > OF_A_LANGUAGE // 2
    torch.testing.assert_close(torch.bincount(test_classes) / counts, torch.full((10,), 0.2), atol=0.01, rtol=0)
    assert "faker" in surnames.source


def test_text_splits_are_moved_only_by_their_own_seed(surnames: Dataset, python_docs: Dataset) -> None:
    for dataset in (surnames, python_docs):
        torch.manual_seed(99)
        again, other = load(dataset.name), load(dataset.name, seed=1)
        assert torch.equal(again.test.tensors[0], dataset.test.tensors[0])
        assert rows(other.test.tensors[0]) != rows(dataset.test.tensors[0])


def test_surnames_without_their_library_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faker.providers.person.hr_HR", None)
    with pytest.raises(DataError, match=r"pip install 'onward\[text\]'"):
        load("surnames")


def test_python_docs_predict_the_next_character(python_docs: Dataset) -> None:
    for split in (python_docs.train, python_docs.test):
        inputs, targets = split.tensors
        assert inputs.shape == targets.shape == (len(split), LENGTH)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert int(targets.max()) < python_docs.num_tokens
        assert not (targets == PADDING).any()
        assert float((targets == UNKNOWN).float().mean()) < 0.02
    assert len(python_docs.train) > 3 * len(python_docs.test) > 3000
    model = build_for("gpt", python_docs, width=8, depth=1)
    check_classifies(model, python_docs)
    inputs, targets = (tensor[:5] for tensor in python_docs.test.tensors)
    losses = python_docs.loss(model(inputs), targets)
    assert python_docs.loss is next_token_loss
    torch.testing.assert_close(losses[2], F.cross_entropy(model(inputs)[2], targets[2]))


def test_no_topic_repeats_what_another_says() -> None:
    texts = topics()
    sentences = [{text[start : start + 200] for start in range(0, len(text) - 200, 200)} for text in texts]
    whole = "\n".join(texts)
    assert all(whole.count(piece) == 1 for of_one in sentences[::7] for piece in of_one)


@pytest.fixture
def articles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """AG-News, small, as a folder of Parquet files."""
    library = pytest.importorskip("datasets", reason="needs the extra 'data'")
    folder = tmp_path / "articles"
    folder.mkdir()
    features = library.Features(text=library.Value("string"), label=library.ClassLabel(num_classes=4))
    for split, texts in (("train", ["Oil: 9% up", "Oil, and oil!", "no"]), ("test", ["Oil down " + "up " * 40])):
        columns = {"text": texts, "label": list(range(len(texts)))}
        library.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    monkeypatch.setattr(ag_news, "HUB_PATH", str(folder))
    return folder


def test_ag_news_loads(articles: Path, tmp_path: Path) -> None:
    dataset = load("ag-news", root=tmp_path / "cache")
    assert dataset.input_shape == (ag_news.LENGTH,)
    assert (dataset.num_classes, dataset.num_tokens) == (4, 7)  # oil, 9, and, no, up
    tokens, classes = dataset.train.tensors
    assert tokens[1, -3:].tolist() == [2, 4, 2]
    assert not tokens[1, :-3].any()
    assert classes.tolist() == [0, 1, 2]
    (long,) = dataset.test.tensors[0].tolist()
    assert long == [2, UNKNOWN] + [6] * (ag_news.LENGTH - 2)
    assert ag_news.words("U.S. don't 42") == ["u", "s", "don", "t", "4", "2"]


def test_ag_news_offline_says_what_to_do(articles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ag_news, "HUB_PATH", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"HF_DATASETS_OFFLINE=1.*'surnames' needs no network"):
        load("ag-news", root=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'onward\[data\]'.*'surnames'"):
        load("ag-news")
