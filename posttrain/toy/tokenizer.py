"""The word-level tokenizer of the small world: a real `tokenizers` tokenizer with a chat template.

Left out: unknown words. Everything the four families can write is in the vocabulary (a test checks).
"""

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from posttrain.toy import arithmetic, phrases, records, sorting

SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", "<tool>"]
MARKS = ["<think>", "</think>", "<call>", "</call>"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<assistant> {{ m.content }} <eos> "
    "{% elif m.role == 'tool' %}<tool> {{ m.content }} "
    "{% else %}<user> {{ m.content }} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """All tokens, special ones first, without repetition."""
    words = "State the final answer to the following arithmetic problem : + - = ; , ? ( )".split()
    words += [str(i) for i in range(arithmetic.LARGEST_TOTAL + 1)]
    words += ["sort", "these", "letters", "up", "down", *sorting.LETTERS]
    words += records.WORDS
    words += ["say", "in", "capitals", "small", "times", "okay", *phrases.WORDS]
    lexicon = [word for language in phrases.WORDS.values() for word in language]
    return list(dict.fromkeys([*SPECIAL, *MARKS, *words, *lexicon, *(w.upper() for w in lexicon)]))


def build() -> PreTrainedTokenizerFast:
    """The tokenizer, ready to be saved beside a checkpoint."""
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(vocabulary())}, unk_token="<unk>"))
    pieces = Split(Regex(r"</?\w+>|'\w+'|\d+|\w+|[^\w\s]"), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>", "<tool>"],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
