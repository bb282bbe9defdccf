"""Does a model read the same tokens when it is taught and when it is asked, and are only label and end token taught?"""

from __future__ import annotations

import pytest

from nbhelpers import models, prompts
from nbhelpers.prompts import Prompts, Wording

TALK = "Doctor: What brings you in?\nPatient: I am thirsty all day and my sugar is high.\nDoctor: Since when?"
CODES = ("E119", "I10", "J4520")
CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML


MISTRAL = (  # a space before an answer, no system role of its own
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
SILENT = NO_SYSTEM.replace("{{ raise_exception('no system role') }}", "").replace(  # drops it without a word
    "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
)
DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%H:%M:%S.%f') %}{% endif %}"
    "<s>Today: {{ date_string }}\n" + CHATML
)


def builder(name="tiny-llama", template=None, window=256, labels=CODES, **wording) -> Prompts:
    tokenizer = models.load_tokenizer(name)
    if template:
        tokenizer.chat_template = template
    return Prompts(tokenizer, Wording(**wording), labels, window, 16)


@pytest.fixture(
    params=[
        *models.bundled_names(),
        "chat template",
        "chat template without a system role",
        "mistral",
        "silent",
        "dated",
    ]
)
def made(request) -> Prompts:
    """A builder for every bundled tokenizer and for tokenizers with a chat template."""
    templates = {"chat template": CHATML, "chat template without a system role": NO_SYSTEM, "mistral": MISTRAL}
    templates |= {"silent": SILENT, "dated": DATED}
    template = templates.get(request.param)
    return builder("tiny-llama" if template else request.param, template)


# ------------------------------------------------------------------------------------------------ training = inference


@pytest.mark.parametrize("talk", [TALK, "Doctor: Hello. " * 400], ids=["short", "cut"])
def test_a_training_row_begins_with_the_inference_prompt_token_for_token(made, talk):
    row, asked = made.row(talk, "E119"), made.prompt(talk).ids
    assert tuple(row["input_ids"][: len(asked)].tolist()) == asked
    assert row["prompt_length"] == len(asked)


def test_only_the_label_and_the_end_token_are_taught(made):
    row = made.row(TALK, "E119")
    taught = [
        token for token, label in zip(row["input_ids"].tolist(), row["labels"].tolist(), strict=True) if label != -100
    ]
    assert taught[-1] == made.end is not None
    assert made.tokenizer.decode(taught[:-1]).strip() == "E11.9"


def test_the_tokens_of_prompt_and_label_are_those_of_the_whole_text(made):
    """Tokenised in one piece by the tokenizer itself: a seam in a place where none is would teach another spelling."""
    row = made.row(TALK, "J4520")
    text = made.text(TALK) + made.prefix + "J45.20"
    whole = made.tokenizer(text, add_special_tokens=not made.chat)["input_ids"]
    assert row["input_ids"].tolist()[:-1] == whole


def test_the_end_token_is_taught_even_where_it_is_the_padding_token():
    tokenizer = models.load_tokenizer("tiny-gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    row = Prompts(tokenizer, Wording(), CODES, 128, 8).row(TALK, "I10")
    assert row["labels"][-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_a_chat_template_ends_an_answer_with_what_it_puts_there():
    made = builder(template=CHATML.replace("</s>", "<pad>"))
    assert made.end == made.tokenizer.convert_tokens_to_ids("<pad>") != made.tokenizer.eos_token_id


def test_a_template_without_a_system_role_has_its_text_in_the_first_question():
    made, other = builder(template=NO_SYSTEM), builder(template=CHATML)
    assert made.system_in_user and not other.system_in_user
    assert "system\n" not in made.text(TALK) and prompts.SYSTEM["icd10"] in made.text(TALK)
    assert other.text(TALK).startswith("<s>system\n" + prompts.SYSTEM["icd10"])


def test_an_answer_stands_where_the_template_would_write_it():
    """Rendered whole by the template, an answer's tokens are those that are taught and ranked."""
    made = builder(template=MISTRAL)
    said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "E11.9"}]
    whole = made.tokenizer(made.tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)
    answer = made.answers["E119"]
    assert made.prefix == " " and tuple(whole["input_ids"][-len(answer) :]) == answer


def test_a_template_that_drops_the_system_text_without_a_word_has_it_in_the_first_question():
    made = builder(template=SILENT)
    assert made.system_in_user and prompts.SYSTEM["icd10"] in made.text(TALK)


def test_a_template_that_writes_todays_date_writes_one_date_for_good():
    first, second = builder(template=DATED), builder(template=DATED)
    assert first.text(TALK) == second.text(TALK) and f"Today: {prompts.DATE}" in first.text(TALK)


def test_another_text_around_the_dialogue_is_another_record():
    assert builder(template=DATED).record()["around"] != builder(template=CHATML).record()["around"]


def test_a_special_token_that_ends_an_answer_is_found_also_where_it_has_no_role():
    tokenizer = models.load_tokenizer("tiny-llama")
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("</s>", "<|end|>")
    made = Prompts(tokenizer, Wording(), CODES, 256, 16)
    assert made.end == tokenizer.convert_tokens_to_ids("<|end|>")


# ------------------------------------------------------------------------------------------------ what is cut


def test_a_long_dialogue_loses_its_beginning_and_keeps_question_and_end(made):
    talk = "Doctor: early words. " * 300 + "Patient: the last word is wheeze."
    prompt = made.prompt(talk)
    text = made.tokenizer.decode(prompt.ids)
    assert prompt.cut > 0 and len(prompt.ids) + made.room <= made.window
    assert "wheeze." in text and (made.chat or text.rstrip().endswith("ICD-10-CM code:"))
    assert "talk of a doctor" in text, "what is asked stays whole"
    assert len(prompt.ids) > (made.window - made.room) * 0.8, "no more is cut than has to be"


def test_a_dialogue_of_a_hundred_thousand_tokens_is_cut_and_counted():
    prompt = builder().prompt("word " * 100_000)
    assert prompt.cut > 400_000 and len(prompt.ids) <= 256


def test_a_dialogue_that_fits_is_whole(made):
    prompt = made.prompt(TALK)
    assert prompt.cut == 0 and "thirsty all day" in made.tokenizer.decode(prompt.ids)


def test_a_window_without_room_for_a_dialogue_is_refused():
    with pytest.raises(ValueError, match="leaves nothing of a window of 48 for the dialogue"):
        builder(window=48)


# ------------------------------------------------------------------------------------------------ wording


def test_listed_labels_and_shots_stand_in_the_prompt_as_they_are_written():
    made = builder(window=512, listed=CODES, shots=(("Patient: I wheeze.", "J4520"),))
    text = made.text(TALK)
    assert "It is one of: E11.9, I10, J45.20." in text
    assert text.index("Patient: I wheeze.\n\nICD-10-CM code: J45.20\n\n") < text.index(TALK)


def test_another_wording_is_another_prompt_in_the_record_and_no_dialogue_stands_there():
    plain, other = Wording(), Wording(system="Say the code.")
    shot = Wording(shots=(("CANARY told a secret", "I10"),))
    assert len({one.record()["sha256"] for one in (plain, other, shot, Wording(listed=CODES))}) == 4
    assert "CANARY" not in str(shot.record()) and shot.record()["shots"] == 1


def test_labels_that_begin_alike_differ_by_their_end():
    made = builder(labels=("F32", "F32A"))
    short, long = made.answers["F32"], made.answers["F32A"]
    assert short[-1] == long[-1] == made.end and short != long[: len(short)]


# ------------------------------------------------------------------------------------------------ there and back


def test_prompts_saved_beside_a_model_ask_as_it_was_taught(tmp_path):
    made = builder(listed=CODES, system="Say the code.")
    made.save(tmp_path)
    again = prompts.load(tmp_path, models.load_tokenizer("tiny-llama"))
    assert again.prompt(TALK) == made.prompt(TALK) and again.answers == made.answers


def test_solved_dialogues_are_not_written_and_prompts_with_them_are_refused(tmp_path):
    builder(window=512, shots=(("CANARY told a secret", "I10"),)).save(tmp_path)
    assert "CANARY" not in (tmp_path / prompts.FILE).read_text()
    with pytest.raises(ValueError, match="1 solved dialogues in each prompt, whose text is not kept"):
        prompts.load(tmp_path, models.load_tokenizer("tiny-llama"))


def test_a_folder_without_prompts_is_refused(tmp_path):
    with pytest.raises(LookupError, match="has no prompt.json"):
        prompts.load(tmp_path, models.load_tokenizer("tiny-llama"))
