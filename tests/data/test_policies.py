import copy

import pytest
import yaml

from tempering.data.policies import BENIGN, load_registry, policy_text, words

NAMES = [
    "harassment_hate", "sexual", "violence_extremism", "self_harm", "illicit", "misinformation", "privacy",
    "intellectual_property", "benign",
]  # fmt: skip


@pytest.fixture(scope="module")
def registry():
    return load_registry()


def changed(tmp_path, change):
    tree = copy.deepcopy(load_registry().model_dump(mode="json"))
    for name in ("summary", "disallowed", "safe_complete"):
        tree["categories"][BENIGN].pop(name)
    change(tree)
    path = tmp_path / "policies.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_the_bundled_registry_has_its_categories_and_keeps_its_limits(registry):
    assert list(registry.categories) == NAMES
    assert all(sum(map(words, c.texts)) <= 160 for c in registry.categories.values())
    assert sum(words(c.summary) for c in registry.categories.values()) <= 300
    assert not registry.categories[BENIGN].disallowed


def test_detail_is_the_own_policies_and_summary_detail_the_summaries_of_the_others(registry):
    detail = policy_text(registry, ["privacy", "sexual", "privacy"], "detail")
    both = policy_text(registry, ["privacy", "sexual"])
    titles = [registry.categories[name].title for name in NAMES]
    assert [t for t in titles if t in detail] == [titles[1], titles[6]]
    assert detail.index(titles[1]) < detail.index(titles[6])  # the registry's order
    assert [t for t in titles if t in both] == titles[:8]  # `benign` has no summary
    assert all(rule in both for rule in registry.categories["privacy"].rules)
    assert not any(rule in both for rule in registry.categories["illicit"].rules)
    assert both.count(registry.categories["privacy"].summary) == 1


@pytest.mark.parametrize("mode", ["detail", "summary_detail"])
def test_an_unknown_category_is_shown_all_summaries(registry, mode):
    text = policy_text(registry, [], mode)
    assert all(c.summary in text for c in registry.categories.values())


def test_labels_of_data_sets_lead_to_categories(registry):
    assert registry.resolve(["Privacy Violation", "ILLICIT", "gardening"]) == (("illicit", "privacy"), ("gardening",))


def test_a_policy_is_cited_by_whole_words(registry):
    assert registry.cited("Under Privacy I refuse; whatever happens.") == ("privacy",)
    assert registry.cited("I phatedly say nothing") == ()


def test_policy_text_is_found_in_any_case_and_spacing(registry):
    rule = registry.categories["privacy"].disallowed[0]
    assert registry.found_in(f"x {rule.upper().replace(' ', chr(10))} y") == rule
    assert registry.found_in("write a privacy policy for my shop") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["categories"]["privacy"].pop("summary"), "privacy: summary is missing"),
        (lambda t: t["categories"]["benign"].update(allowed=["a " * 31, "b"]), "31 words, more than 30"),
        (lambda t: t["categories"]["privacy"].update(objective="a " * 130), "more than 160"),
        (
            lambda t: [
                c.update(summary="a " * 40, objective="b", allowed=["c", "d"])
                for c in t["categories"].values()
                if c.get("summary")
            ],
            "more than 300",
        ),
        (lambda t: t["categories"]["privacy"].update(title=t["categories"]["illicit"]["title"]), "share the title"),
        (lambda t: t["categories"]["privacy"].update(title="Privacy"), "two words or more"),
        (lambda t: t["aliases"].update(x="nowhere"), "'x' leads to 'nowhere'"),
        (lambda t: t["categories"]["benign"].update(disallowed=["a"]), "has only objective"),
        (lambda t: t["categories"]["privacy"].update(alowed=["a"]), "unknown field 'categories.privacy.alowed'"),
    ],
)
def test_a_wrong_registry_is_one_message_that_names_the_file(tmp_path, change, message):
    path = changed(tmp_path, change)
    with pytest.raises(ValueError, match="policies") as error:
        load_registry(path)
    assert message in str(error.value) and path.name in str(error.value)


def test_a_missing_registry_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policies .*no such file"):
        load_registry(tmp_path / "none.yaml")
