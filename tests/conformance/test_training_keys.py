"""What a config says of training alone: one table of it, and that nobody looks at it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from timbre_methods.config import BESIDE, INERT, PeftConfig, is_on
from timbre_methods.registry import method_for, methods, prompt_methods

EVERYTHING = {**methods(), **prompt_methods()}
PEFTS_OWN = sorted(name for name, method in EVERYTHING.items() if method.checked_against == "PEFT")

NOT_LOOKED_AT: Mapping[str, str] = {
    "about the file": """
        auto_mapping base_model_name_or_path inference_mode name peft_type peft_version revision
        task_name task_type
    """,
    "which layers: the tensors' names tell": """
        exclude_modules feedforward_modules layers_pattern layers_to_transform num_layers
        target_modules
    """,
    "sizes: the tensors' shapes tell, or the base's": """
        decompose_both decompose_factor fan_in_fan_out init_r num_attention_heads oft_block_size r
        r_lora rank target_r token_dim use_effective_conv2d
    """,
    "places: the file has them": """
        density mask_type num_tunable_weights off_diag pattern random_seed ratio_salt seed
    """,
    "where training began": """
        corda_config cpt_token_ids d_initial delora_lambda eva_config
        init_ia3_weights init_logits_std init_lora_weights init_scale init_theta_d_bound
        init_v_bound init_vector_bank_bound init_weights lambda_pattern loftq_config lora_ga_config
        lora_init router_init_range
        prompt_tuning_init prompt_tuning_init_state_dict_path prompt_tuning_init_task
        prompt_tuning_init_text svd_threshold target_svd_config tokenizer_kwargs
        tokenizer_name_or_path
    """,
    "what was dropped": """
        boft_dropout deft_dropout encoder_dropout ffn_dropout frod_dropout gralora_dropout hira_dropout
        lora_dropout miss_dropout module_dropout psoft_dropout pvera_dropout randlora_dropout
        rank_dropout rank_dropout_scale tinylora_dropout unilora_dropout vblora_dropout vera_dropout
        xlora_dropout_p
    """,
    "the course of training": """
        asa_importance_beta asa_schedule_exponent asa_target_subspaces asa_uncertainty_beta beta1
        beta2 candidate_reselection_proportion candidate_reselection_steps cpt_mask
        cpt_tokens_type_mask deltaT dtype final_warmup generator_seed init_warmup
        initial_reselection_rate jitter_noise
        mask_interval num_frozen_tokens opt_loss_decay_factor opt_projection_epsilon
        opt_projection_format_epsilon opt_weighted_loss_type orth_reg_weight reselection_steps
        router_aux_loss_coef router_loss router_z_loss_coef
        selection_accumulation_steps selection_algorithm tfinal tinit total_step use_asa
        use_dynamic_rank use_trainable_adapters
    """,
    "a network that training alone runs": """
        encoder_hidden_size encoder_num_layers encoder_reparameterization_type prefix_projection
    """,
    "how the trainer runs": "megatron_core progressbar runtime_config runtime_offload_base_weight",
    "of another variant, which is refused when it is on": """
        expert_capacity qalora_group_size sparse_step
    """,
    "what layers share: the file repeats it": "stride_A",
    "written by AdaLoRA, whose formula has neither": "alpha_pattern use_rslora",
    "written by MoRAM, whose formula has no scale": "lora_alpha",
}
"""All keys that a method does not look at, by what they are about."""

READ_BY_ONE = {
    "init_r": "adalora",
    "init_weights": "miss",
    "layers_to_transform": "unilora",
    "peft_type": "miss",
    "qalora_group_size": "qalora",
    "target_modules": "unilora",
}
"""Keys that one method reads."""
READ_BY_SEVERAL: Mapping[str, set[str]] = {
    "alpha_pattern": {"adalora"},
    "init_lora_weights": {"adalora", "moram"},
    "lora_alpha": {"moram"},
    "num_attention_heads": {"cpt", "multitask_prompt_tuning", "p_tuning", "prompt_tuning"},
    "num_layers": {"cpt", "multitask_prompt_tuning", "p_tuning", "prompt_tuning"},
    "r": {"adalora", "increlora", "moram", "oft", "shira"},
    "random_seed": {"shira"},
    "token_dim": {"cpt", "multitask_prompt_tuning", "p_tuning", "prompt_tuning"},
    "use_rslora": {"adalora"},
}
"""Keys that several methods read, with those that do not look at them."""
LOOKED_AT_ALL_THE_SAME = {
    ("oft", "peft_version"): "before 0.18 the series of use_cayley_neumann was another one"
}
OURS = {"task_id"}
"""Keys that PEFT does not write and that say what its file leaves open."""
HOSTILE: tuple[object, ...] = (
    "(a+)+$",
    "/etc/passwd",
    ["x"] * 100_000,
    [0, 99],
    {"base_model_class": "Evil", "parent_library": "evil"},
    10**400,
    float("nan"),
    True,
    False,
    None,
)

each_method = pytest.mark.parametrize("name", sorted(EVERYTHING))


def model_of(name: str) -> type[PeftConfig]:
    model: type[PeftConfig] = get_type_hints(EVERYTHING[name].parse)["return"]
    return model


def test_the_table_holds_each_key_that_is_not_looked_at_once() -> None:
    listed = [key for keys in NOT_LOOKED_AT.values() for key in keys.split()]
    assert sorted(listed) == sorted(INERT.union(*(model_of(name).inert for name in EVERYTHING)))


def test_a_key_that_one_method_reads_and_another_does_not_is_no_oversight() -> None:
    listed = {key for keys in NOT_LOOKED_AT.values() for key in keys.split()}
    readers = {key: {name for name in EVERYTHING if key in model_of(name).model_fields} for key in listed}
    alone = {key: min(names) for key, names in readers.items() if len(names) == 1}
    assert alone == READ_BY_ONE
    several = [key for key, names in readers.items() if len(names) > 1]
    not_readers = {key: {name for name in EVERYTHING if key in model_of(name).inert} for key in several}
    assert not_readers == READ_BY_SEVERAL
    assert all(not model_of(name).inert & model_of(name).model_fields.keys() for name in EVERYTHING)


@each_method
@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_what_training_alone_needs_is_not_looked_at(
    name: str, value: object, config_of: Callable[[str], dict[str, Any]]
) -> None:
    raw_config, model = config_of(name), model_of(name)
    keys = (INERT | model.inert) - model.model_fields.keys() - {"peft_type"}
    keys -= {key for method, key in LOOKED_AT_ALL_THE_SAME if method == name}
    changed = {**raw_config, **dict.fromkeys(keys, value)}
    assert method_for(changed).name == name
    assert EVERYTHING[name].parse(changed) == EVERYTHING[name].parse(raw_config)


def pefts_fields(raw_config: Mapping[str, Any]) -> dict[str, object]:
    """The keys of PEFT's own config of this kind, with their defaults."""
    kind = raw_config["peft_type"].replace("BONE", "MISS")
    return {
        field.name: None
        if field.default is field.default_factory
        else field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)])
    }


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_each_key_is_pefts_with_its_default(name: str, config_of: Callable[[str], dict[str, Any]]) -> None:
    model, fields = model_of(name), pefts_fields(config_of(name))
    assert (model.inert | model.model_fields.keys()) - OURS <= fields.keys()
    for key, field in model.model_fields.items():
        if key in OURS:
            assert not field.is_required()
        elif field.is_required():
            assert not is_on(fields[key]), f"{key} may be left out of the file"
        else:
            assert field.default == fields[key] or (field.default is None and fields[key] == {})


@pytest.mark.parametrize("name", PEFTS_OWN)
def test_each_key_that_peft_writes_is_read_off_or_not_looked_at(
    name: str, config_of: Callable[[str], dict[str, Any]]
) -> None:
    raw_config = config_of(name)
    known = INERT | BESIDE | model_of(name).inert | model_of(name).model_fields.keys()
    fields = pefts_fields(raw_config)
    assert [key for key in fields if key not in known and is_on(fields[key])] == []
    assert raw_config.keys() - INERT - OURS <= fields.keys()
