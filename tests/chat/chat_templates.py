"""Chat templates that behave as real ones are said to, written here from their description."""

# A system turn always; reasoning on by default; earlier turns lose theirs; no tags at all become an empty pair.
NEMOTRON_3 = """
{%- set thinks = enable_thinking if enable_thinking is defined else true -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\n<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role == 'assistant' -%}
    {%- if '<think>' not in content and '</think>' not in content -%}
      {%- set content = '<think></think>' + content -%}
    {%- endif -%}
    {%- if loop.index0 < last.user and '<think>' in content and '</think>' in content -%}
      {%- set content = '<think></think>' + content.split('</think>')[-1] -%}
    {%- endif -%}
    {%- set content = content.strip() -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' + ('<think>\n' if thinks else '<think></think>') -}}
{%- endif -%}
"""

# Super can be asked for little effort, Ultra for less; 3.5 Lightning is as Nano.
NEMOTRON_3_SUPER = NEMOTRON_3.replace(
    "{{- '<|im_start|>' + message.role",
    "{%- if low_effort and loop.index0 == last.user -%}{%- set content = content + '\n\nBriefly.' -%}{%- endif -%}"
    "{{- '<|im_start|>' + message.role",
)
NEMOTRON_3_ULTRA = NEMOTRON_3_SUPER.replace("low_effort", "medium_effort")

# /think or /no_think in any text, the last one counts, on by default, never printed; history keeps what follows
# </think>; a final answer is given a tag.
NANO_V2 = """
{%- set mode = namespace(thinks=true) -%}
{%- for message in messages -%}
  {%- if message.role != 'assistant' -%}
    {%- if '/think' in message.content -%}{%- set mode.thinks = true -%}
    {%- elif '/no_think' in message.content -%}{%- set mode.thinks = false -%}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{{- '<SPECIAL_10>System\n' -}}
{%- for message in messages -%}
  {%- set content = message.content.replace('/think', '').replace('/no_think', '').strip() -%}
  {%- if message.role == 'system' -%}{{- content -}}{%- endif -%}
  {%- if loop.first -%}{{- '\n' -}}{%- endif -%}
  {%- if message.role == 'user' -%}{{- '<SPECIAL_11>User\n' + content + '\n' -}}{%- endif -%}
  {%- if message.role == 'assistant' -%}
    {{- '<SPECIAL_11>Assistant\n' -}}
    {%- if loop.last -%}
      {{- ('<think>\n' if mode.thinks else '<think></think>') + message.content.strip() -}}
    {%- else -%}
      {{- message.content.split('</think>')[-1].strip() -}}
    {%- endif -%}
    {{- '\n<SPECIAL_12>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<SPECIAL_11>Assistant\n' + ('<think>\n' if mode.thinks else '<think></think>') -}}
{%- endif -%}
"""

# The system text switches. No end marker: the next header ends the turn. A question prints the assistant's header.
H_REASONING = """
{{- '<SPECIAL_10>System\n' -}}
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- system.strip() -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '\n<SPECIAL_11>User\n' + message.content.strip() + '\n<SPECIAL_11>Assistant\n' -}}
    {%- if loop.last and "{'reasoning': True}" in system -%}{{- '<think>\n' -}}{%- endif -%}
    {%- if loop.last and "{'reasoning': False}" in system -%}{{- '<think></think>' -}}{%- endif -%}
  {%- endif -%}
  {%- if message.role == 'assistant' -%}{{- message.content.strip() -}}{%- endif -%}
{%- endfor -%}
"""

# Reasoning is the target's own to open; off prints an empty pair. Only answers after the last question keep theirs, and
# the last of all is given an empty pair if it has none.
QWEN3 = """
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content -%}
  {%- if message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > last.user and (loop.last or reasoning) -%}
      {%- set content = '<think>\n' + reasoning + '\n</think>\n\n' + content -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

# As Qwen 3, but the prompt opens the reasoning, the newest answer has tags always, and tools are called in XML.
QWEN3_5 = """
{%- if tools -%}{{- '<|im_start|>system\n<function=name>\n</function><|im_end|>\n' -}}{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content.strip() -%}
  {%- if message.role == 'assistant' -%}
    {%- set reasoning = '' -%}
    {%- if '</think>' in content -%}
      {%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() -%}
      {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.index0 > last.user -%}
      {%- set content = '<think>\n' + reasoning + '\n</think>\n\n' + content -%}
    {%- endif -%}
  {%- endif -%}
  {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}
  {%- else -%}{{- '<think>\n' -}}{%- endif -%}
{%- endif -%}
"""

# Functions in the system turn, calls behind the content, results in a user turn; reasoning is a field of its own.
TOOLS = """
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- for tool in tools -%}{{- (tool | tojson) + '\\n' -}}{%- endfor -%}
  {{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'tool' -%}
    {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}{{- message.content -}}
    {%- else -%}{%- for part in message.content -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
    {%- for call in message.tool_calls -%}
      {%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
      {{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
THINKING_TOOLS = TOOLS.replace(
    "    {%- if message.content is string",
    "    {%- if message.reasoning_content -%}"
    "{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' -}}{%- endif -%}\n"
    "    {%- if message.content is string",
).replace("<|im_start|>assistant\\n' -}}{%- endif", "<|im_start|>assistant\\n<think>\\n' -}}{%- endif")

# Calls as the checkpoints' own templates print them: Qwen 3, Nemotron 3, Nano v2.
HERMES = TOOLS.replace(
    "'<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>'",
    "'<tool_call>\\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) "
    "+ '\\n</tool_call>'",
)
FUNCTION_TAGS = TOOLS.replace(
    "{{- '<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>' -}}",
    "{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' -}}"
    "{%- for key, value in call.function.arguments.items() -%}"
    "{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' -}}"
    "{%- endfor -%}{{- '</function>\\n</tool_call>' -}}",
)
TOOLCALL_LIST = TOOLS.replace(
    "'<tool_call>' + call.function.name + (call.function.arguments | tojson) + '</tool_call>'",
    "'<TOOLCALL>[' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + ']</TOOLCALL>'",
)

# Contents are trimmed, an answer's role is "model", and the system text goes into the first question.
GEMMA = """
{{- bos_token -}}
{%- set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
  {%- set expected = 'user' if loop.index0 % 2 == 0 else 'assistant' -%}
  {%- if message.role != expected -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
  {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' -}}
  {{- (system if loop.first else '') + message.content.strip() + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""

# The second Gemma refuses a system text.
GEMMA_2 = "{%- if messages[0].role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}" + GEMMA

LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

# A system turn always. Every answer that is printed keeps only what follows </think>, the last one too. In version 1.5
# /no_think in the system text makes the prompt print an empty pair.
LLAMA_NEMOTRON = """
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{{- bos_token + '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{{- system.replace('/no_think', '').strip() + '<|eot_id|>' -}}
{%- for message in messages if message.role != 'system' -%}
  {%- set content = message.content -%}
  {%- if message.role == 'assistant' -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + content.strip() + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
  {%- if '/no_think' in system -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

# A system turn always, with a text of its own.
GRANITE = """
{%- if messages[0].role != 'system' -%}
  {{- '<|start_of_role|>system<|end_of_role|>You are a helpful assistant.<|end_of_text|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
  {{- '<|start_of_role|>' + message.role + '<|end_of_role|>' + message.content + '<|end_of_text|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""

NEMOTRON_MINI = """
{{- '<extra_id_0>System\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content.strip() -}}{%- endif -%}
{{- '\n\n' -}}
{%- for message in messages if message.role != 'system' -%}
  {{- '<extra_id_1>' + ('User' if message.role == 'user' else 'Assistant') + '\n' + message.content.strip() + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<extra_id_1>Assistant\n' -}}{%- endif -%}
"""

# Contents are trimmed; a last answer is printed with an empty pair that the generation prompt prints only when off.
EMPTY_PAIR = """
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\n' -}}
  {%- if message.role == 'assistant' and loop.last and '</think>' not in message.content -%}
    {{- '<think>\n\n</think>\n\n' -}}
  {%- endif -%}
  {{- message.content.strip() + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""

STRICT = """
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{{- raise_exception('no system turns here') -}}{%- endif -%}
  {{- message.role + ': ' + message.content + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}
"""
