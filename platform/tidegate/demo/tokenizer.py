"""The demo model's tokenizer and chat template."""

from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tidegate.demo.corpus import conversations
from tidegate.demo.curriculum import FIRST_STAGE

VOCABULARY = 1536
CONTEXT = 1024
PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"

# Tools are offered, called and answered as `demo.tools` writes it.
CHAT_TEMPLATE = """\
{%- set offered = namespace(text='') -%}
{%- for tool in tools or [] -%}
{%- set function = tool['function'] or tool -%}
{%- set shown = namespace(text='') -%}
{%- for name, about in ((function['parameters'] or {})['properties'] or {}).items() -%}
{%- set kind = about['type'] if about['type'] is string else 'any' -%}
{%- set shown.text = shown.text ~ ('' if loop.first else ', ') ~ '"' ~ name ~ '" ' ~ kind -%}
{%- endfor -%}
{%- set offered.text = offered.text ~ '\\n- "' ~ function['name'] ~ '" (' ~ shown.text ~ '): ' -%}
{%- set offered.text = offered.text ~ (function['description'] or '') -%}
{%- endfor -%}
{%- set offered.text = 'Tools:' ~ offered.text if offered.text else '' -%}
{%- if offered.text and messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\n' ~ offered.text ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception("unknown role '" ~ message['role'] ~ "': use system, user, assistant or tool") -}}
{%- endif -%}
{%- if message['role'] == 'system' and not loop.first and loop.previtem['role'] != 'system' -%}
{{- raise_exception('system messages must be the first messages') -}}
{%- endif -%}
{%- set said = namespace(text=(message['content'] or '') | trim) -%}
{%- if message['role'] == 'system' and loop.first and offered.text -%}
{%- set said.text = said.text ~ ('\\n\\n' if said.text else '') ~ offered.text -%}
{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{%- set arguments = function['arguments'] -%}
{%- set arguments = arguments if arguments is string else arguments | tojson -%}
{%- set said.text = said.text ~ ('\\n' if said.text else '') ~ '<tool_call>\\n{"name": "' -%}
{%- set said.text = said.text ~ function['name'] ~ '", "arguments": ' ~ arguments ~ '}\\n</tool_call>' -%}
{%- endfor -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ said.text ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def build_tokenizer(seed: int, chats: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: lossless on any text, digits and quoted words in single characters.

    A letter stands alone when at most 15 more letters lie between it and a double quote, so that
    `"tide"` is four letters to the model while ` tide` is one token. The bound keeps the look-ahead
    linear on hostile input.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r'[A-Za-z](?=[A-Za-z]{0,15}")'), "isolated"),
            pre_tokenizers.Split(Regex(r" ?\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = islice(conversations("train", seed, FIRST_STAGE), chats)
    tokenizer.train_from_iterator(
        (f"{m['role']}\n{m['content']}\n" for chat in sample for m in chat), trainer
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped
