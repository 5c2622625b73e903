import pytest

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from tempering.core.records import Completion, Prompt  # noqa: E402
from tempering.judges import load_judge  # noqa: E402
from tempering.judges.classifier import ClassifierJudge  # noqa: E402

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "safe", "unsafe", "user", "assistant", "hello", "world", "again", ":"]
PROMPT = Prompt(({"role": "user", "content": "hello"},))


def tokenizer():
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
    )


def config(**kw):
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **kw
    )  # fmt: skip


@pytest.fixture
def head(tmp_path):
    def make(**kw):
        model = LlamaForSequenceClassification(config(**kw))
        model.score.weight.data.mul_(50)
        model.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        return str(tmp_path), model.eval()

    return make


def completions(*texts):
    return [Completion(PROMPT.id, text, "stop", i) for i, text in enumerate(texts)]


def test_the_score_is_the_probability_of_the_label(head):
    path, model = head(
        num_labels=3, id2label={0: "ok", 1: "toxic", 2: "hate"}, label2id={"ok": 0, "toxic": 1, "hate": 2}
    )
    ids = tokenizer()("world again", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.softmax(-1)[0]
    named = ClassifierJudge(path, "harmful", labels=["Toxic"], device="cpu")
    both = ClassifierJudge(path, "harmful", device="cpu")
    assert named(PROMPT, completions("world again"))[0].score == pytest.approx(float(expected[1]), abs=1e-5)
    assert both(PROMPT, completions("world again"))[0].score == pytest.approx(float(expected[1:].sum()), abs=1e-5)


def test_neighbours_in_a_batch_do_not_change_a_score(head):
    path, _ = head(num_labels=2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1})
    texts = ["hello", "hello world again again again", "again"]
    judge = ClassifierJudge(path, "harmful", device="cpu")
    together = [v.score for v in judge(PROMPT, completions(*texts))]
    alone = [judge(PROMPT, completions(t))[0].score for t in texts]
    assert together == pytest.approx(alone, abs=1e-5)


def test_a_multi_label_head_gives_its_largest_probability(head):
    path, model = head(
        num_labels=2, id2label={0: "toxic", 1: "hate"}, label2id={"toxic": 0, "hate": 1},
        problem_type="multi_label_classification",
    )  # fmt: skip
    ids = tokenizer()("again", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = float(model(ids).logits.sigmoid().max())
    judge = ClassifierJudge(path, "harmful", device="cpu")
    assert judge(PROMPT, completions("again"))[0].score == pytest.approx(expected, abs=1e-5)


def test_a_scorer_of_toxicity_tells_its_labels_apart(head):
    names = ["toxic", "insult", "identity_hate", "male"]
    path, model = head(
        num_labels=4, id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)},
        problem_type="multi_label_classification",
    )  # fmt: skip
    ids = tokenizer()("again", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits.sigmoid()[0].tolist()
    verdict = ClassifierJudge(path, "toxic", device="cpu")(PROMPT, completions("again"))[0]
    assert verdict.score == pytest.approx(expected[0], abs=1e-5)
    assert verdict.attributes == pytest.approx({"insult": expected[1], "identity_attack": expected[2]}, abs=1e-5)
    assert ClassifierJudge(path, "harmful", device="cpu")(PROMPT, completions("again"))[0].attributes == {}


def test_a_pair_reads_the_request_too(head):
    path, _ = head(num_labels=2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1})
    judge = ClassifierJudge(path, "harmful", reads="pair", device="cpu")
    other = Prompt(({"role": "user", "content": "again again world"},))
    assert judge(PROMPT, completions("world"))[0].score != judge(other, completions("world"))[0].score


@pytest.mark.parametrize("spec", ["classifier:{}", "classifier:{}#nonsense"])
def test_labels_that_do_not_answer_the_question_are_an_error_naming_them(head, spec):
    path, _ = head(num_labels=2, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    with pytest.raises(ValueError, match=r"among its labels \(cat, dog\)"):
        load_judge(spec.format(path), "harmful")(PROMPT, completions("world"))


def test_nothing_is_loaded_before_the_first_question():
    assert load_judge("classifier:no/such-model", "harmful").identity.startswith("classifier:no/such-model")
    assert load_judge("guard:no/wildguard", "harmful").identity.startswith("guard:no/wildguard")


def test_failed_and_empty_completions_are_not_classified():
    judge = load_judge("classifier:no/such-model", "harmful")
    failed, empty = judge(PROMPT, [Completion(PROMPT.id, "", "error", error="down"), *completions(" ")])
    assert failed.is_unscored
    assert empty.score == 0.0


def test_a_chat_model_is_no_classifier_whatever_label_is_named(tmp_path):
    """transformers would give it a head of random numbers, with the labels LABEL_0 and LABEL_1."""
    LlamaForCausalLM(config()).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for spec in (f"classifier:{tmp_path}", f"classifier:{tmp_path}#LABEL_1"):
        with pytest.raises(ValueError, match=r"classifier:.* is another kind of model.*score\.weight"):
            load_judge(spec, "harmful")(PROMPT, completions("hello world"))


@pytest.mark.parametrize("spec", ["classifier:{}", "guard:{}#llama_guard"])
def test_a_model_that_is_not_there_is_named_with_its_judge(spec, tmp_path):
    spec = spec.format(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=rf"judge {spec.partition('#')[0]}: .*nowhere could not be loaded .*correct"):
        load_judge(spec, "harmful")(PROMPT, completions("hello world"))
