"""
The table of all claims of the five documents: what each says, what a lesson measured beside it, and how to see it again.

    python notebooks/course/claims.py --write     makes notebooks/CLAIMS.md from the pages as they ran

What a claim says, what was measured, and whether it holds, is read from the printed lines of claim() in the lessons. What
is kept here is the command, or the test, by which a reader sees it without the lesson.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from course.build import NOTEBOOKS, printed, sources  # noqa: E402

PAGE = NOTEBOOKS / "CLAIMS.md"
ARTICLE = "python bench.py compare --random bart-base --prompt-tokens 1024 --max-new-tokens 100"
DOCUMENTS = {
    1: "Understanding incremental decoding (S. Shleifer, 2020)", 13: "A tutorial on transformers and the KV cache (FNLP)",
    25: "key_value_cache.ipynb (Alan Turing Institute, minGPT)", 38: "A question on shapes in decoder attention",
    44: "A post on sparse transformers and multi-query attention"}
SEEN = {  # number: the command or test
    1: ARTICLE,
    2: ARTICLE,
    3: ARTICLE,
    4: "tests/test_cost.py::test_counting_the_start_token_among_the_outputs_is_one_call_less",
    5: "tests/test_generate.py::test_every_strategy_and_every_batch_gives_the_same_tokens_in_fp64",
    6: "tests/test_generate.py::test_rows_end_on_their_own_and_leave_the_others_alone",
    7: "make lessons",
    8: "tests/test_model.py::test_a_decoder_needs_no_source",
    9: "tests/test_cost.py::test_cross_keys_and_values_are_projected_once_when_cached",
    10: "python bench.py compare --random gpt2 --prompt-tokens 32 --strategies naive,cached,further.concat:slip",
    11: "tests/test_cost.py::test_what_caching_saves_is_told_linear_by_linear",
    12: ARTICLE,
    13: "make lessons",
    14: "tests/test_model.py::test_future_tokens_cannot_change_past_logits",
    15: "make lessons",
    16: "tests/test_attention.py::test_the_readable_and_the_fast_attention_agree_and_equal_a_loop",
    17: "make lessons",
    18: "make lessons",
    19: "tests/test_attention.py::test_the_readable_and_the_fast_attention_agree_and_equal_a_loop",
    20: "python bench.py trace --random gpt2 --prompt-tokens 16 --max-new-tokens 4",
    21: "tests/test_attention.py::test_any_split_into_chunks_gives_the_same_output",
    22: "python bench.py trace --random gpt2 --prompt-tokens 16 --max-new-tokens 4",
    23: "tests/test_cost.py::test_cache_bytes_are_keys_and_values_of_every_kv_head",
    24: "tests/test_cost.py::test_cache_bytes_are_keys_and_values_of_every_kv_head",
    25: "tests/test_attention.py::test_seed_notebook_numbers_are_reproduced",
    26: "tests/test_attention.py::test_seed_notebook_numbers_are_reproduced",
    27: "tests/test_attention.py::test_cache_shape_is_max_batch_kv_head_block_head_dim_and_unwritten_slots_are_zero",
    28: "tests/test_attention.py::test_prefill_with_cache_is_bit_equal_to_without",
    29: "tests/test_attention.py::test_prefill_of_three_and_five_single_steps_is_close",
    30: "tests/test_attention.py::test_cache_shape_is_max_batch_kv_head_block_head_dim_and_unwritten_slots_are_zero",
    31: "tests/test_attention.py::test_prefill_of_three_and_five_single_steps_is_close",
    32: "tests/test_attention.py::test_any_split_into_chunks_gives_the_same_output",
    33: "make lessons",
    34: "tests/test_attention.py::test_shared_kv_heads_equal_full_heads_with_the_same_keys_and_values",
    35: "tests/test_generate.py::test_a_request_that_does_not_fit_is_refused_alike_with_and_without_cache_before_anything_runs",
    36: "tests/test_weights.py::test_logits_and_greedy_tokens_match_huggingface_loaded_and_saved_again",
    37: "tests/test_attention.py::test_what_cannot_be_stored_is_refused_before_anything_is_written",
    38: "python bench.py trace --random bart-base --prompt-tokens 16 --max-new-tokens 4",
    39: "tests/test_cost.py::test_attention_output_has_the_shape_of_its_query",
    40: "tests/test_model.py::test_the_first_token_depends_on_the_source",
    41: "tests/test_cost.py::test_a_decoder_prompt_enters_at_once_and_then_one_token_at_a_time",
    42: "tests/test_generate.py::test_any_of_several_ids_ends_a_row",
    43: "tests/test_cost.py::test_teacher_forcing_reads_source_and_target_once",
    44: "tests/test_sparse.py::test_the_entries_are_n_sqrt_n",
    45: "tests/test_sparse.py::test_the_entries_are_n_sqrt_n",
    46: "tests/test_sparse.py::test_two_hops_reach_every_earlier_position",
    47: "tests/test_sparse.py::test_top_k_reads_its_own_block_and_the_best_before_it",
    48: "tests/test_sparse.py::test_cache_bytes_divide_by_how_many_share",
    49: "tests/test_sparse.py::test_multi_query_is_grouped_by_all_and_multi_head_with_tied_heads",
    50: "python bench.py attention",
    51: "python bench.py decode --random gpt2 --prompt-tokens 32 --max-new-tokens 32",
}


def measured():
    """number -> a list of (lesson's stem, what the document says, what was found, whether it holds), from the pages."""
    import nbformat

    found = {}
    for source in sources():
        page = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
        for number, theirs, ours, verdict in re.findall(r"^Claim (\d+): (.*)\n    here: (.*)\n    (It holds|It does not hold)",
                                                        printed(page), re.MULTILINE):
            found.setdefault(int(number), []).append((source.stem, theirs, ours, verdict == "It holds"))
    return found


def table():
    lines = ["# What the documents claim, and what we find", "",
             "Made by `python notebooks/course/claims.py --write` from the lessons as they ran; times are those of that run.",
             "A test, `tests/...::...`, is run by `python -m pytest` and its name."]
    found = measured()
    for number, seen in SEEN.items():
        if number in DOCUMENTS:
            lines += ["", f"## {DOCUMENTS[number]}", "", "| | it says | we find | | lesson | see it |", "|---|---|---|---|---|---|"]
        for lesson, theirs, ours, holds in found.get(number, [("", "", "no lesson", False)]):
            link = f"[{lesson[:2]}]({lesson}.ipynb)" if lesson else ""
            cells = [str(number), theirs, ours, "yes" if holds else "**no**", link, f"`{seen}`"]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(table(), encoding="utf-8")
    print(table())
