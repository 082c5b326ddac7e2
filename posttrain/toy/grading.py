"""The judge of the small world: a generative reward model that says in which language an answer is.

It is trained on verdicts about answers to the tasks of phrases.py, in the very words that rewards/judge.py asks with. The
reason, the language it sees, comes before the score. Answers in no language of the lexicon, among them orders to the
grader, get 0. Its tokenizer knows words only: all else in the JSON document is dropped.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from posttrain.rewards.judge import CANARIES, question
from posttrain.schema import Task
from posttrain.toy import phrases

OPEN = '{"criteria": [{"reason": "'
CLOSE = {score: f'", "score": {score}}}]}}' for score in (0, 10)}
NO_LANGUAGE = "mixed"
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<user> {{ m.content }} "
    "{% elif m.role == 'assistant' %}<assistant> {{ m.content }} <eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""The instructions, which never change, are not read."""
RIGHT, FOREIGN, JUNK = 0.4, 0.3, 0.15
"""Shares of answers in the asked language, in another one and in none; the rest mixes two languages."""


def verdicts(*, n: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """n chats: a question to the judge and the verdict it should give."""
    rng = random.Random(seed)
    for task in phrases.tasks(seed=seed, n=n):
        asked = task.meta["language"]
        language, answer = _answer(task, rng)
        score = 10 if language == asked else 0
        messages = question(task, task.meta["criteria"], answer)
        verdict = f"{OPEN} the words are {language} {CLOSE[score]}"
        yield {"messages": [*messages, {"role": "assistant", "content": verdict}]}


def build() -> PreTrainedTokenizerFast:
    """The judge's tokenizer, ready to be saved beside its checkpoint."""
    words = (
        "conversation role user content criteria reference_answer candidate_answer every word is null".split()
    )
    words += "say in capitals small letters times the words are 2 3 4".split()
    words += [NO_LANGUAGE, *phrases.WORDS]
    words += [word for language in phrases.WORDS.values() for word in language]
    vocabulary = list(dict.fromkeys([*SPECIAL, *words]))
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Split(Regex(r"\w+"), behavior="removed", invert=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    made.add_tokens([AddedToken(text, normalized=False) for text in (OPEN, *CLOSE.values())])
    return made


def _answer(task: Task, rng: random.Random) -> tuple[str, str]:
    """The language of an answer (NO_LANGUAGE: none, or more than one), and the answer."""
    asked: str = task.meta["language"]
    others = [name for name in phrases.WORDS if name != asked]
    kind = rng.random()
    if kind < JUNK:
        return NO_LANGUAGE, rng.choice([*CANARIES, task.question, "okay", "1 2 3 4", "none of it"])
    if kind < JUNK + RIGHT + FOREIGN:
        language = asked if kind < JUNK + RIGHT else rng.choice(others)
        return language, _phrase(task, phrases.WORDS[language], rng)
    first, second = (phrases.WORDS[name] for name in rng.sample(sorted(phrases.WORDS), 2))
    return NO_LANGUAGE, f"{_phrase(task, first, rng)} , {_phrase(task, second, rng)}"


def _phrase(task: Task, words: Sequence[str], rng: random.Random) -> str:
    """Two words, mostly those asked for, one to five times, in either case."""
    pair = task.meta["say"] if rng.random() < 0.7 else rng.sample(range(len(words)), 2)
    text = " , ".join([" ".join(words[i] for i in pair)] * rng.randint(1, 5))
    return text.upper() if rng.random() < 0.5 else text
