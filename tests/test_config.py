"""Recipes: merging, overrides, and one clear line for what is wrong."""

from pathlib import Path

import pytest

from posttrain import config
from posttrain.units import ancestors, config_hash, expand, stage_sources

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "configs" / "demo.toml"
RECIPES = sorted((ROOT / "configs").glob("*.toml"))

SMALL = """
name = "small"
[[domains]]
name = "math"
tasks = "t.jsonl"
rewards = [{ fn = "posttrain.rewards.answer:exact" }]
[[stages]]
name = "convert"
kind = "convert"
source = "./dense"
[[stages]]
name = "rl"
kind = "rl"
source = "convert"
steps = 3
mix = { math = {} }
optimizer = { lr = 1e-4 }
"""


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    cfg = config.load([recipe])
    assert config.Run.model_validate_json(cfg.model_dump_json()) == cfg


def test_there_are_the_four_recipes() -> None:
    assert {"demo", "forgetting", "v32", "glm4_moe_lite_30b_a3b"} <= {path.stem for path in RECIPES}


def test_the_published_recipe_uses_the_papers_normalisation() -> None:
    cfg = config.load([ROOT / "configs" / "v32.toml"])
    rl = [stage for stage in cfg.stages if isinstance(stage, config.Rl)]
    assert rl and all(stage.loss.norm == "sequence" and stage.loss.kl == "unbiased" for stage in rl)
    assert all(stage.loss.offpolicy_delta is not None for stage in rl)
    (convert,) = (stage for stage in cfg.stages if isinstance(stage, config.Convert))
    assert (convert.index_topk, convert.index_n_heads, convert.index_head_dim) == (2048, 64, 128)


def test_forgetting_spends_the_same_rollouts_in_both_arms() -> None:
    cfg = config.load([ROOT / "configs" / "forgetting.toml"])
    spent = {
        s.name: s.steps * s.tasks_per_step * s.group_size for s in cfg.stages if isinstance(s, config.Rl)
    }
    assert spent.pop("together") == sum(spent.values())


def test_later_files_and_settings_win(tmp_path: Path) -> None:
    layer = _file(tmp_path, "seed = 7\n[cluster]\nrollout_actors = 3\n")
    cfg = config.load([DEMO, layer], ["stages.warmup.steps=9", "rollouts.temperature=0.5", "name=other"])
    assert (cfg.seed, cfg.cluster.rollout_actors, cfg.name) == (7, 3, "other")
    assert cfg.rollouts.temperature == 0.5 and cfg.rollouts.max_rows == 400
    assert next(s.steps for s in cfg.stages if s.name == "warmup") == 9  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 3", "steps = 3\nstepps = 4"), "stages.rl.stepps: unknown key"),
        (("steps = 3", "steps = 0"), "stages.rl.steps: Input should be greater than or equal to 1 (got 0)"),
        (("steps = 3", "steps = 3\ngroup_size = 1"), "stages.rl.group_size: Input should be greater than or"),
        (
            ('source = "./dense"', 'source = "./dense"\nindex_topk = 0'),
            "stages.convert.index_topk: Input should",
        ),
        (("mix = { math = {} }", "mix = {}"), "stages.rl.mix: Dictionary should have at least 1 item"),
        (("mix = { math = {} }", "mix = { maths = {} }"), "unknown domain 'maths'; known: math"),
        (('source = "convert"', 'source = "later"'), "source 'later' is no stage"),
        (('name = "rl"', 'name = "convert"'), "stage 'convert' is defined 2 times"),
        (('kind = "rl"', 'kind = "ppo"'), "stages.rl: Input tag 'ppo'"),
        (("rewards = [{", "max_turns = 2\nrewards = [{"), "max_turns=2 without a tool"),
        (('name = "small"', ""), "name: Field required"),
        (('name = "small"', "name = "), "not valid TOML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in SMALL
    with pytest.raises(ValueError) as error:
        config.load([_file(tmp_path, SMALL.replace(*change))])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "write it as key.subkey=value"),
        ("stages.nope.steps=3", "no stages named 'nope'"),
        ("name.x=3", "name is not a table"),
        ("stages.rl.stepps=3", "stages.rl.stepps: unknown key"),
    ],
)
def test_a_mistaken_setting_is_one_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        config.load([_file(tmp_path, SMALL)], [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_only_what_a_stage_depends_on_is_in_its_hash(tmp_path: Path) -> None:
    path = _file(tmp_path, SMALL)
    base = config.load([path])
    rl = next(unit for unit in expand(base) if unit.name == "rl")

    def changed(*overrides: str) -> bool:
        cfg = config.load([path], overrides)
        unit = next(u for u in expand(cfg) if u.name == "rl")
        return config_hash(cfg, unit) != config_hash(base, rl)

    assert changed("stages.rl.steps=4") and changed("seed=1") and changed("rollouts.temperature=0.5")
    assert changed("domains.math.max_new_tokens=9")
    assert not changed("out=/elsewhere") and not changed("cluster.rollout_actors=4")
    assert not changed("stages.convert.index_topk=64"), "a source's change comes through its manifest"


JUDGE = """
[[stages]]
name = "grm"
kind = "pretrain"
steps = 1
tokenizer = "posttrain.toy.grading:build"
data = { chats = ["py://posttrain.toy.grading:verdicts?n=9"] }
optimizer = { lr = 1e-3 }
evaluate = false
"""
ASKS = """rewards = [{ fn = "a:b", args = { judge = { checkpoint = "stage://grm", names = ["stage://grm", "x"] } } }]"""


def test_a_reward_may_ask_a_stage_of_the_run(tmp_path: Path) -> None:
    asking = SMALL.replace('rewards = [{ fn = "posttrain.rewards.answer:exact" }]', ASKS)
    first = asking.replace("[[stages]]", f"{JUDGE}[[stages]]", 1)
    cfg = config.load([_file(tmp_path, first)])
    units = {unit.name: unit for unit in expand(cfg)}
    assert {name: stage_sources(cfg, unit) for name, unit in units.items()} == {
        "grm": [],
        "convert": [],
        "rl": ["convert", "grm"],
        "rl.eval": ["rl", "grm"],
    }
    assert [u.name for u in ancestors(cfg, list(units.values()), units["rl"])] == ["grm", "convert"]
    reward = cfg.domain("math").rewards[0].resolved(cfg.path)
    folder = str(cfg.path / "grm")
    assert reward.args == {"judge": {"checkpoint": folder, "names": [folder, "x"]}} and not reward.stages
    for wrong, message in (
        (asking, "which is no stage"),
        (asking + JUDGE, "which comes later; put it first"),
    ):
        with pytest.raises(ValueError, match=f"domain 'math': a reward asks stage 'grm', {message}"):
            config.load([_file(tmp_path, wrong)])
