"""Each fault of the public reproduction, as a mutant of the library, is caught by a check that the library passes."""

import re

import checks
import pytest
from mutants import selection, study, updates

# (fault, check, what the check says of it)
FAULTS = [
    (updates.statistics_read_before_they_exist, checks.a_stage_with_a_mask_update_finishes, "does not finish"),
    (updates.mean_of_a_list, checks.a_stage_with_a_mask_update_finishes, "does not finish"),
    (selection.static_layer_outputs_zero, checks.static_channel_is_scaled_by_gamma, "a static channel is zero"),
    (updates.masks_per_layer, checks.masks_are_per_channel, "one number per layer"),
    (updates.statistics_of_feature_maps, checks.statistics_are_those_of_the_gates, "q is not the mean of the gates"),
    (study.statistics_of_the_test_set, checks.nothing_is_fitted_or_chosen_on_test_images, "test image was read"),
    (updates.gamma_is_random, checks.gamma_becomes_the_mean_gate, "is not the mean gate"),
    (selection.wrong_channel_count, checks.density_suppresses_its_share_in_every_layer, r"conv3 suppresses"),
    (selection.extra_relu, checks.conversion_is_exact, "another function"),
    (selection.batch_norm_keeps_its_affine_part, checks.conversion_is_exact, "another function"),
    (selection.gate_multiplies_the_shift, checks.output_is_the_formula, r"not a \* \(eta \* y \+ beta\)"),
    (selection.random_predictors, checks.conversion_is_exact, "another function"),
    (study.no_source_stage, checks.the_source_stage_teaches_the_predictors, "has learnt nothing"),
    (study.hooks_are_left, checks.features_are_those_of_this_step, "hooks stay"),
    (updates.no_macs_counter, checks.macs_are_those_of_each_image, "mean of what each image costs"),
    (updates.product_of_means, checks.macs_are_those_of_each_image, "mean of what each image costs"),
    (updates.stream_without_its_shortcut, checks.macs_are_those_of_each_image, "mean of what each image costs"),
    (updates.predictors_for_free, checks.macs_are_those_of_each_image, "left out of the total"),
    (study.no_pruning_loop, checks.each_budget_is_met_from_the_point_before, "the budget is not lowered"),
    (study.each_budget_starts_from_the_source, checks.each_budget_is_met_from_the_point_before, "has come back"),
    (selection.removed_channel_keeps_its_shift, checks.removed_channel_is_exactly_zero, "is not zero"),
    (selection.removed_channel_is_only_scaled_down, checks.removed_channel_is_exactly_zero, "is not zero"),
    (study.no_seeds, checks.the_same_seed_gives_the_same_numbers, "two runs with one seed differ"),
    (study.chosen_on_the_test_set, checks.nothing_is_fitted_or_chosen_on_test_images, "test image was read"),
    (study.no_validation_split, checks.nothing_is_fitted_or_chosen_on_test_images, "nothing to choose by"),
    (selection.masks_missing_from_the_state_dict, checks.masks_survive_saving, "lost its m"),
    (study.unsquared_norm, checks.afd_is_the_formula, "not the formula's R"),
    (study.shared_bias, checks.attention_bias_is_per_channel, "gets no gradient"),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for _, check, _ in FAULTS), ids=lambda check: check.__name__)
def test_the_library_holds(check, tmp_path):
    check(tmp_path)


@pytest.mark.parametrize(
    ("mutant", "check", "message"), FAULTS, ids=[f"{mutant.__name__}-{check.__name__}" for mutant, check, _ in FAULTS]
)
def test_a_mutant_is_caught(mutant, check, message, tmp_path):
    with mutant(), pytest.raises(AssertionError, match=message) as caught:
        check(tmp_path)
    # Caught by the check's own statement, in one sentence, not by an accident on the way.
    assert re.search(message, str(caught.value).splitlines()[0])


def test_mutants_leave_the_library_as_it_was(tmp_path):
    for mutant in dict.fromkeys(mutant for mutant, _, _ in FAULTS):
        with mutant():
            pass
    checks.conversion_is_exact(tmp_path)
    checks.output_is_the_formula(tmp_path)
    checks.macs_are_those_of_each_image(tmp_path)
    checks.afd_is_the_formula(tmp_path)
