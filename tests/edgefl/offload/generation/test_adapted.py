"""Language models with what a job has learnt: against peft's own model, and against hand-made trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefl import Task
from edgefl.errors import ConfigError
from edgefl.offload.generation.adapted import with_adapter, with_learnt, with_parameters
from edgefl.offload.generation.language_model import LanguageModel
from edgefl.offload.generation.splitting import split_language_model
from edgefl.offload.generation.stage_info import CHANGES_FILE, WEIGHTS_FILE, TextFacts
from edgefl.simulation.simulate import simulate
from edgefl.trees import EncodedTree, SpooledTree, factors_of, write_tree
from tests.language_models import byte_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the [offload] extra")
peft = pytest.importorskip("peft", reason="needs the [lora] extra")

TARGETS = ["q_proj", "down_proj"]
QUERY = "model.layers.1.self_attn.q_proj.weight"


def base(*, tied=False):
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def language_model(module=None) -> LanguageModel:
    return LanguageModel(name="m", module=module or base(), tokenizer=byte_tokenizer(), text=TextFacts(end_tokens=(2,)))


def wrapped(rank=2, **more):
    return peft.get_peft_model(base(), peft.LoraConfig(r=rank, lora_alpha=6, target_modules=TARGETS, **more))


def loss(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())


def texts(part="0", parts="1"):
    tokens = torch.randint(0, 260, (8, 13), generator=torch.Generator().manual_seed(int(part)))
    return tokens[:, :-1], tokens[:, 1:]


def logits(module):
    with torch.no_grad():
        return module(input_ids=torch.arange(12)[None]).logits.numpy()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Adapters after two rounds of one client (of rank 4): the task, and the file of its parameters."""
    task = Task(name="lora-text", model=wrapped, loss=loss, train_data=texts)
    file = tmp_path_factory.mktemp("job") / "adapted.safetensors"
    settings = {"train.lr": 5.0, "train.epochs": 2, "train.batch_size": 4}
    simulate(task, clients=1, rounds=2, engine="loop", set=settings, out=file)
    return task, file


def own_sum(file):
    """Return the base with W + D in numpy, by the names of the file."""
    tree, module = SpooledTree(file), base()
    state = module.state_dict()
    for name in tree:
        if name.endswith("@lora"):
            place = name.removeprefix("base_model.model.").removesuffix("@lora") + ".weight"
            state[place] += torch.from_numpy(np.array(tree[name]))
    return module


def test_parameters_of_a_job_are_added_to_the_weights(trained, tmp_path) -> None:
    _, file = trained
    made, expected = with_parameters(language_model(), file), logits(own_sum(file))
    assert np.abs(expected - logits(base())).max() > 1e-3
    assert logits(made.module) == pytest.approx(expected, abs=1e-5)
    made_head, _ = split_language_model(made, 1, tmp_path)  # which compares both parts with the model
    before = split_language_model(language_model(), 1, tmp_path / "base")
    assert before[0].digest != made_head.digest
    names = {part: set(SpooledTree(tmp_path / part / CHANGES_FILE)) for part in ("head", "tail")}
    assert names["head"] == {f"model.layers.0.{one}.weight@lora" for one in ("self_attn.q_proj", "mlp.down_proj")}
    assert len(names["tail"]) == 4
    assert not (tmp_path / "base" / "head" / CHANGES_FILE).exists()


def test_changes_are_the_difference_to_the_base_in_all_bits(trained, tmp_path) -> None:
    from edgefl.models.adapters.patch import added

    _, file = trained
    split_language_model(with_parameters(language_model(), file), None, tmp_path / "new")
    split_language_model(language_model(), None, tmp_path / "old")
    old, new = (SpooledTree(tmp_path / which / "whole" / WEIGHTS_FILE) for which in ("old", "new"))
    changes = SpooledTree(tmp_path / "new" / "whole" / CHANGES_FILE)
    for name in changes:
        weight = name.removesuffix("@lora")
        assert np.array_equal(added(old[weight], factors_of(changes, name)), new[weight])
    assert {name for name in old if not np.array_equal(old[name], new[name])} == {
        name.removesuffix("@lora") for name in changes
    }


def test_an_adapter_of_peft_gives_what_peft_computes(trained, tmp_path) -> None:
    from edgefl.models.adapters.peft_format import write_adapter

    task, file = trained
    write_adapter(task, SpooledTree(file), tmp_path / "adapter")
    made = with_adapter(language_model(), tmp_path / "adapter")
    assert logits(made.module) == pytest.approx(logits(own_sum(file)), abs=1e-5)
    assert isinstance(made.module, transformers.LlamaForCausalLM)
    assert len(made.changes) == 6
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert logits(made.module) == pytest.approx(logits(theirs), abs=1e-5)


def test_an_adapter_of_other_weights_is_refused(trained, tmp_path) -> None:
    from edgefl.models.adapters.peft_format import write_adapter

    task, file = trained
    write_adapter(task, SpooledTree(file), tmp_path / "adapter")
    other = base()
    other.model.layers[0].self_attn.q_proj.weight.data += 0.01
    with pytest.raises(ConfigError, match="was trained on other weights than those of m"):
        with_adapter(language_model(other), tmp_path / "adapter")


def test_an_adapter_that_another_program_made(tmp_path) -> None:
    theirs = wrapped(rank=3, use_rslora=True)
    for name, one in theirs.named_parameters():
        if "lora_B" in name:
            one.data.normal_()
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs.eval())
    made = with_adapter(language_model(), tmp_path)
    assert logits(made.module) == pytest.approx(expected, abs=1e-4)


def test_an_adapter_that_is_no_sum_of_products_is_refused(tmp_path) -> None:
    wrapped(use_dora=True).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be put into m: .*DoRA"):
        with_adapter(language_model(), tmp_path)


def test_a_model_that_was_trained_whole_replaces_all_weights(tmp_path) -> None:
    other = base()
    for one in other.parameters():
        one.data *= 1.5
    stored = {f"decoder.{name}": one.numpy() for name, one in other.state_dict().items()}  # in a module of the task's
    made = with_parameters(language_model(), written(tmp_path, stored))
    assert np.array_equal(logits(made.module), logits(other))
    assert made.changes == {}


def test_a_module_that_was_trained_whole_beside_adapters(tmp_path) -> None:
    task = Task(
        name="with-head", model=lambda: wrapped(modules_to_save=["lm_head"]), loss=loss, train_data=texts
    )  # fmt: skip
    file = tmp_path / "whole-head.safetensors"
    simulate(task, clients=1, rounds=1, engine="loop", set={"train.lr": 5.0}, out=file)
    made = with_parameters(language_model(), file)
    [head] = [name for name in SpooledTree(file) if "lm_head.modules_to_save" in name]
    assert np.array_equal(made.module.state_dict()["lm_head.weight"].numpy(), SpooledTree(file)[head])
    assert not torch.equal(made.module.state_dict()["lm_head.weight"], base().state_dict()["lm_head.weight"])
    assert len(made.changes) == 6
    split_language_model(made, 1, tmp_path)


def test_a_matrix_that_is_not_in_factors_is_added_too(tmp_path) -> None:
    change = np.full((16, 16), 0.25, np.float32)
    made = with_parameters(
        language_model(), written(tmp_path, every({f"{QUERY.removesuffix('.weight')}@lora": change}))
    )
    assert np.array_equal(made.module.state_dict()[QUERY], base().state_dict()[QUERY] + torch.from_numpy(change))
    assert made.changes == {}


def every(more, module=None):
    """Return all tensors of the base, with some others."""
    return {name: one.numpy() for name, one in (module or base()).state_dict().items()} | more


def written(folder, stored):
    file = folder / "parameters.safetensors"
    with file.open("wb") as opened:
        write_tree(EncodedTree(stored), opened)
    return file


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"model.layers.7.self_attn.q_proj.weight": np.zeros((16, 16), np.float32)},
         "has a tensor 'model.layers.7.self_attn.q_proj.weight', which m has not: it has tensors such as"),
        ({QUERY: np.zeros((16, 15), np.float32)}, r"has shape \[16, 15\], expected \[16, 16\] as in m"),
        ({QUERY: np.full((16, 16), np.nan, np.float32)}, "has NaN or infinite values"),
        ({QUERY: np.zeros((16, 16), np.int64)}, "has dtype int64, expected floating-point numbers"),
        ({f"{QUERY.removesuffix('.weight')}@lora": np.full((16, 16), 3e38, np.float32),
          QUERY: np.full((16, 16), 3e38, np.float32)}, "has NaN or infinite values"),  # the sum
        ({"model.layers.0.mlp.down_proj.lora_B.default.weight": np.zeros((16, 2), np.float32)},
         "a factor that was trained alone, without its scaling"),
    ],
)  # fmt: skip
def test_parameters_of_another_model_are_refused(tmp_path, stored, words) -> None:
    with pytest.raises(ConfigError, match=words):
        with_parameters(language_model(), written(tmp_path, every(stored)))


def test_a_part_of_the_parameters_is_refused(tmp_path) -> None:
    two_of_three = {name: one for name, one in every({}).items() if "layers.2." not in name}
    for stored, words in (
        (two_of_three, "lacks 9 of the 30 tensors of m, such as 'model.layers.2."),
        ({}, "lacks 30 of"),
    ):
        with pytest.raises(ConfigError, match=words):
            with_parameters(language_model(), written(tmp_path, stored))


def test_tied_weights_that_were_trained_apart_are_refused(tmp_path) -> None:
    tied = base(tied=True)
    ends = {name: np.zeros((260, 16), np.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    once = every(ends, tied)
    assert with_parameters(language_model(base(tied=True)), written(tmp_path, once)).changes == {}
    del once["lm_head.weight"]  # a job has tied tensors once
    assert with_parameters(language_model(base(tied=True)), written(tmp_path, once)).changes == {}
    ends["lm_head.weight"] += 1
    with pytest.raises(ConfigError, match="they are tied in the model, and were trained apart"):
        with_parameters(language_model(base(tied=True)), written(tmp_path, every(ends, tied)))
    on_head = every({"lm_head@lora": np.ones((260, 16), np.float32)}, tied)
    with pytest.raises(ConfigError, match=r"trained on lm_head\.weight, which is model\.embed_tokens"):
        with_parameters(language_model(base(tied=True)), written(tmp_path, on_head))


def saved(folder, config, change=lambda stored: stored):
    """Save an adapter of the base whose numbers are drawn, after a change of its tensors."""
    theirs = peft.get_peft_model(base(), config)
    for one in filter(lambda one: one.requires_grad, theirs.parameters()):
        one.data.normal_(std=0.1)
    theirs.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    write_adapter_file(file, change({name: np.array(array) for name, array in SpooledTree(file).items()}))
    return folder


def write_adapter_file(file, stored):
    with file.open("wb") as opened:
        write_tree(stored, opened)


def lora(**more):
    return peft.LoraConfig(r=2, target_modules=TARGETS, **more)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        (lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"), dict,
         "is of the kind IA3; only LoRA"),
        (lambda: peft.LoHaConfig(r=2, target_modules=TARGETS), dict, "is of the kind LOHA; only LoRA"),
        (lambda: lora(trainable_token_indices=[1, 2]), dict, "LoRA with trainable_token_indices"),
        (lora, lambda stored: {}, "lacks 12 tensors that its configuration says"),
        (lora, lambda stored: {name: one for name, one in stored.items() if "layers.0" in name}, "lacks 8 tensors"),
        (lora, lambda stored: {f"x.{name}": one for name, one in stored.items()}, "lacks 12 tensors"),
        (lora, lambda stored: stored | {"base_model.model.model.layers.9.q.lora_A.weight": np.ones((2, 2), np.float32)},
         "has 1 tensors that this model has no place for"),
        (lora, lambda stored: {name: one.astype(np.int64) for name, one in stored.items()}, "has dtype int64"),
    ],
)  # fmt: skip
def test_an_adapter_of_which_a_part_would_be_lost_is_refused(tmp_path, config, change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        with_adapter(language_model(), saved(tmp_path, config(), change))


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"peft_type": "LORA", "r": "two"}', '{"peft_type": "LORA", "target_modules": "("}']
)
def test_a_damaged_configuration_is_refused(tmp_path, text) -> None:
    saved(tmp_path, lora())
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot be put into m"):
        with_adapter(language_model(), tmp_path)


def test_whatever_peft_trains_beside_products_is_in_the_weights(tmp_path) -> None:
    for number, config in enumerate(
        (lora(modules_to_save=["lm_head"]), lora(bias="all"), lora(rank_pattern={"q_proj": 5}))
    ):
        folder = saved(tmp_path / str(number), config)
        theirs = peft.PeftModel.from_pretrained(base(), folder).eval()
        made = with_adapter(language_model(), folder)
        assert logits(made.module) == pytest.approx(logits(theirs), abs=1e-5)


def test_folders_and_options_that_say_nothing_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"it has no adapter_config\.json"):
        with_learnt(language_model(), adapter=tmp_path)
    with pytest.raises(ConfigError, match="give either --parameters or --adapter"):
        with_learnt(language_model(), parameters=tmp_path, adapter=tmp_path)
    model = language_model()
    assert with_learnt(model) is model
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it has no adapter_model\.safetensors"):  # peft would look for it on a hub
        with_adapter(model, tmp_path)
