"""The known ways in which servers of many adapters give wrong answers, and what covers each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
EXACT, LOADS, MODELS = "test_engine_exactness", "test_engine_loads", "test_engine_models"
ARGUMENTS, SAMPLING = "test_engine_arguments", "test_engine_sampling"
ROOM, CLOSING = "test_engine_room", "test_engine_closing"
AT_DEVICE, AT_ONCE = "test_adapter_room", "test_adapter_at_once"
POOL, CONFIG, LIVE = "test_adapter_pool", "test_adapter_config", "test_adapter_live"
REACH, KERNELS = "test_engine_reach", "test_kernels_segmented"

# What goes wrong, and the tests that it does not, as file.test; or why it cannot happen.
TRAPS: dict[str, list[str] | str] = {
    "1: a prefix is shared across adapters": [
        f"{EXACT}.test_a_shared_prompt_is_never_shared_across_adapters",
        f"{EXACT}.test_prefixes_are_shared_with_the_same_adapter_alone",
    ],
    "2: a name is loaded again, and its old keys and values are used": [
        f"{EXACT}.test_a_name_that_is_loaded_again_shares_nothing_with_its_past",
        f"{POOL}.test_a_name_that_is_loaded_again_is_another_version_for_new_leases_only",
    ],
    "3: a slot is used again while rows with it are under way": [
        f"{AT_DEVICE}.test_what_is_used_or_pinned_does_not_leave",
        f"{AT_DEVICE}.test_steps_for_which_a_batch_may_still_read_what_has_ended",
        f"{AT_ONCE}.test_any_sequence_of_calls",
        f"{ROOM}.test_threads_submit_cancel_load_and_unload_at_once",
        f"{LOADS}.test_every_answer_is_right_while_adapters_come_and_go",
    ],
    "4: a CUDA graph is captured without an adapter and stays so": [
        f"{KERNELS}.test_a_captured_launch_serves_every_later_batch",
        f"{EXACT}.test_graphs_with_and_without_adapters_are_others",
    ],
    "5: a grid or a number of segments is fixed at capture": [
        f"{KERNELS}.test_a_captured_launch_serves_every_later_batch",
        f"{EXACT}.test_graphs_with_and_without_adapters_are_others",
        f"{REACH}.test_launches_of_a_batch_are_alike_whatever_is_loaded_meanwhile",
        f"{REACH}.test_a_graph_is_another_once_adapters_have_reached_more",
    ],
    "6: metadata of a larger batch stays behind a smaller one": [
        f"{EXACT}.test_padded_batches",
        f"{KERNELS}.test_a_captured_launch_serves_every_later_batch",
    ],
    "7: padding and the base get an adapter": [
        f"{EXACT}.test_padded_batches",
        f"{EXACT}.test_all_slots_may_be_full",
        f"{KERNELS}.test_rows_without_an_adapter_keep_every_bit",
    ],
    "8: what lies beyond a rank is multiplied": [
        # conftest fills what is allocated with NaN: the arena, too.
        f"{EXACT}.test_kernels_say_what_peft_says",
        f"{KERNELS}.test_kernels_are_as_accurate_as_torch",
    ],
    "9: sums in any order": [f"{KERNELS}.test_same_inputs_give_the_same_bits"],
    "10: the low-rank activations are rounded to 16 bits": [
        f"{KERNELS}.test_h_keeps_more_bits_than_the_adapters_have",
    ],
    "11: rsLoRA and patterns are ignored": [
        f"{EXACT}.test_a_mixed_batch_says_what_peft_says",
        f"{CONFIG}.test_scalings_of_random_patterns_are_those_of_peft",
        f"{LIVE}.test_the_scalings_of_a_live_model_are_those_it_uses",
    ],
    "12: a linear that an adapter lacks keeps that of the one before": [
        f"{POOL}.test_a_slot_that_is_used_again_has_nothing_of_what_was_there",
        f"{EXACT}.test_a_mixed_batch_says_what_peft_says",
    ],
    "13: ranks and widths differ inside of a group": [
        f"{POOL}.test_siblings_are_neighbours_in_the_tables",
        f"{EXACT}.test_kernels_say_what_peft_says",
    ],
    "14: the head has other rows than there are tokens, and shares its weight": [
        f"{EXACT}.test_families_and_adapters_of_the_head",
        f"{EXACT}.test_the_head_where_prompts_go_on",
        f"{EXACT}.test_a_head_that_is_called_with_all_tokens",
    ],
    "15: experts are called with tokens in another order": [
        f"{MODELS}.test_linears_that_are_called_with_other_rows",
        f"{CONFIG}.test_what_is_not_plain_lora_is_refused_by_name",  # target_parameters
    ],
    "16: offsets of 32 bits": [
        f"{KERNELS}.test_pages_and_rows_beyond_32_bits_are_found",
        f"{KERNELS}.test_rows_beyond_32_bits_are_found",
    ],
    "17: adapters in another dtype than the model": [
        f"{EXACT}.test_16_bit_models_have_their_adapters_in_16_bits",
        f"{POOL}.test_numbers_that_a_16_bit_model_cannot_hold_are_refused",
    ],
    "18: forks, requests that begin again, and those that were offloaded lose their adapter": [
        f"{EXACT}.test_several_answers_to_a_prompt",
        f"{EXACT}.test_a_mixed_batch_says_what_peft_says",
    ],
    "19: generate infers a mask that hides tokens": (
        "of the judge, not of the engine: serving_models.Judge passes a mask, and prompts hold the "
        "padding's token"
    ),
    "20: an exception ends the loop, and with it everybody": [
        f"{ARGUMENTS}.test_what_is_no_prompt_is_refused_and_nothing_is_begun",
        f"{SAMPLING}.test_rows_without_finite_scores_do_not_stop_the_others",
        f"{ROOM}.test_adapters_are_loaded_and_unloaded_while_requests_run",
        f"{ROOM}.test_an_adapter_that_cannot_be_read_again_is_an_error_of_its_requests",
        f"{CLOSING}.test_an_error_ends_requests_with_its_reason_and_the_engine_begins_again",
        f"{EXACT}.test_several_answers_to_a_prompt",  # of which transformers dies with one token
    ],
    "21: a quantized base has another dtype and another forward": [
        f"{MODELS}.test_linears_that_others_made_keep_what_they_do",
    ],
    "22: torch.compile makes constants of the batch": [
        f"{MODELS}.test_a_compiled_model_asks_every_batch",
    ],
    "23: a kernel is taken from a cache for another shape": [
        "test_segmented_add.test_launches_are_kept_by_all_that_they_were_prepared_for",
    ],
    "24: an adapter that cannot be loaded throws another one out": [
        f"{POOL}.test_what_cannot_be_used_is_refused_and_nothing_else_is_touched",
        f"{AT_DEVICE}.test_nobody_leaves_for_nothing",
        f"{AT_DEVICE}.test_nobody_leaves_for_pieces_that_are_too_small",
        f"{ROOM}.test_an_adapter_that_is_refused_disturbs_nobody",
    ],
    "25: an adapter is unloaded under a request": [
        f"{POOL}.test_a_name_that_is_unloaded_is_gone_at_once_and_its_weights_when_nobody_uses_them",
        f"{ROOM}.test_adapters_are_loaded_and_unloaded_while_requests_run",
    ],
    "26: ranks of tensor parallelism disagree on slots": "the engine runs on one device",
    "27: what is more than plain LoRA is ignored": [
        f"{CONFIG}.test_what_is_not_plain_lora_is_refused_by_name",
        f"{CONFIG}.test_every_field_of_the_installed_peft_is_known",
        f"{LIVE}.test_live_models_of_more_than_plain_lora_are_refused",
    ],
    "28: the first request's sampling is everybody's": [
        f"{SAMPLING}.test_every_request_is_sampled_as_it_says",
        f"{SAMPLING}.test_samples_follow_temperature_top_k_and_top_p",
    ],
}


def names_in(file: str) -> set[str]:
    """Return the names of a file's tests."""
    tree = ast.parse((TESTS / f"{file}.py").read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_trap_is_listed():
    assert [int(trap.partition(":")[0]) for trap in TRAPS] == list(range(1, 29))


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_is_covered(trap):
    covered = TRAPS[trap]
    if isinstance(covered, str):
        assert len(covered) > 20, "the reason"
        return
    assert covered
    for name in covered:
        file, _, test = name.partition(".")
        assert test.startswith("test_")
        assert test in names_in(file), name
