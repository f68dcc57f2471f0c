"""What the tests try to break it with: `python tests/accidents.py` prints the README's table.

The cases are counted, not typed in: a case is one test that pytest collects, also of those for SLOW=1. It belongs to
the first kind of which a pattern is found in its name. A pattern that is found in none ends the script with status 1.
"""
import os
import re
import sys

import pytest

LINE = "one line that says what and where, status 2"
KINDS = {  # kind: what is promised, patterns of test names
    "checkpoints: cut off, foreign, with impossible headers, shapes or numbers": (
        f"{LINE}; no code in them is run",
        "files_that_are_refused a_header_that tensors_of_odd_shapes a_folder_that_cannot_be a_folder_without_a_part "
        "parts_that_do_not_fit another_model_s_tokenizer weights_that_are_no_numbers what_is_no_file runs?_no_code "
        "mistakes.*(safetensors|SentencePiece)"),
    "lists, shards and folders of data: broken lines, impossible sizes, pipes, a damaged index": (
        f"{LINE}; what lacks an image or a text is left out and counted",
        "a_bad_line a_bad_file damaged_shards members_of_impossible_size no_regular_file unreadable_folder "
        "errors_in_the_data half_a_character records_without damaged_index data_that_cannot_teach "
        r"mistakes.*(jsonl|holds\sno\simages)"),
    "questions, annotations and results of benchmarks": (LINE, "test_benchmarks.*mistakes results_of_another_run"),
    "images: empty, cut off, huge, thin, in odd modes, vanished, of other formats": (
        f"read as well as can be, or {LINE}; training takes the next one",
        "bad_images odd_images only_plain_image images_of_every_kind images_that_vanish next_image_takes no_image_at "
        r"image_that_is_none mistakes.*(cannot\sbe\sread\sas\san\simage|no\ssuch\simage)"),
    "arguments: missing, out of range, clashing": (LINE, "mistakes_give_one_line sizes_are_refused where_an_export"),
    "texts: typed sentinels, other encodings, unknown words, too long": (
        "read as plain characters; what is left out is reported", "no_sentinel odd_questions not_utf8 their_letters"),
    "output: a full disk, a closed pipe, too little memory, Ctrl-C": (
        f"{LINE} (Ctrl-C 130, a closed pipe 141); old files stay",
        "a_full_disk_leaves disk_that_is_full output_that_cannot ends_of_a_program interrupted_export"),
    "runs that are stopped: SIGTERM, SIGHUP, kill -9, a process that dies": (
        "the same command goes on, to the same result; `kill -9` costs at most the steps since the last checkpoint",
        "killed_run kills_at_random polite_kill signal_to_all process_that_dies killed_and_started"),
    "runs that find damaged checkpoints, a full disk, other settings or data, a loss that is no number": (
        f"the last good checkpoint is used, or {LINE}; no finished work is overwritten",
        "checkpoint_that_cannot_be_read spoilt_page moved_aside full_disk_costs loss_that_is_no_number holds_one_run "
        "changed_data not_overwritten the_start_that_it_began_with when_all_is_done")}


class Collector:
    def pytest_collection_finish(self, session):
        self.names = [item.nodeid for item in session.items]


if __name__ == "__main__":
    collector = Collector()
    assert not pytest.main(["--collect-only", "-pno:terminal", os.path.dirname(os.path.abspath(__file__))], [collector])
    rest = collector.names
    print("| what is tried | cases | what is promised |\n|---|---|---|")
    for kind, (promise, patterns) in KINDS.items():
        fitting = [{name for name in rest if re.search(pattern, name)} for pattern in patterns.split()]
        if not all(fitting):
            sys.exit(f"no test is called {patterns.split()[fitting.index(set())]}: {kind}")
        print(f"| {kind} | {len(set.union(*fitting))} | {promise} |")
        rest = [name for name in rest if name not in set.union(*fitting)]
    print(f"| together | {len(collector.names) - len(rest)} of {len(collector.names)} tests | |")
