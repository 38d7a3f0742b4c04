//! Templates of the shapes that models have, written for this test.

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate { source: source.into(), bos: "<s>".into(), eos: "</s>".into() }
}

/// As SmolLM2 and Qwen2 have it: a system message of its own where none is given.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
    {{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}\
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Qwen3: what an earlier answer thought is left out.
const QWEN3: &str = "{%- set ns = namespace(last=-1) %}\
    {%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
    {%- for message in messages %}\
    {%- if message.role == 'assistant' %}\
        {%- set content = message.content %}\
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}\
        {%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content }}\
        {%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}\
        {{- '<|im_end|>\n' }}\
    {%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}\
    {%- endfor %}\
    {%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}";

/// Llama 3: white space around messages is left out.
const LLAMA3: &str = "{% set loop_messages = messages %}{% for message in loop_messages %}\
    {% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}\
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";

/// Gemma 3: the system message is the beginning of the user's first.
const GEMMA3: &str = "{{ bos_token }}\
    {%- if messages[0]['role'] == 'system' -%}\
        {%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}\
    {%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}\
    {%- for message in rest -%}\
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}\
        {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}\
        {{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}\
    {%- endfor -%}\
    {%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}";

/// Gemma 2: no system message.
const GEMMA2: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}\
    {% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}";

/// Phi-3, which closes with EOS where nothing is to be generated.
const PHI3: &str = "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '<|end|>\n' }}\
    {% elif message['role'] == 'user' %}{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}\
    {% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}";

/// Mistral and Llama 2: one token ends an answer, another begins the next round.
const LLAMA2: &str = "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}\
    {% else %}{% set rest = messages %}{% set system = false %}{% endif %}\
    {% for message in rest %}\
    {% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}\
    {% else %}{% set content = message['content'] %}{% endif %}\
    {% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content + ' [/INST]' }}\
    {% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}";

const MISTRAL: &str = "{{ bos_token }}{% for message in messages %}\
    {% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}\
    {% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}\
    {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}";

/// TinyLlama: line breaks of the template itself are text.
const TINYLLAMA: &str = "{% for message in messages %}\n\
    {% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n\
    {% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n\
    {% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n\
    {% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}";

fn pieces(begin: &str, system: Option<[&str; 2]>, answer: &str, next: &str) -> ChatPieces {
    let system = system.map(|parts| parts.map(str::to_owned));
    let [begin, answer, next] = [begin, answer, next].map(str::to_owned);
    ChatPieces { begin, system, answered: answer.clone(), answer, next, ..ChatPieces::default() }
}

#[test]
fn templates_come_apart() {
    let im = |role: &str| format!("<|im_end|>\n<|im_start|>{role}\n");
    let chatml = ["<|im_start|>system\n", &im("user")];
    let begin = format!("<|im_start|>system\nBe kind.{}", im("user"));
    assert_eq!(
        template(CHATML).pieces().unwrap(),
        pieces(&begin, Some(chatml), &im("assistant"), &im("user"))
    );
    assert_eq!(
        template(QWEN3).pieces().unwrap(),
        ChatPieces {
            forgets_thinking: true,
            ..pieces("<|im_start|>user\n", Some(chatml), &im("assistant"), &im("user"))
        }
    );

    let head = |role: &str| format!("<|start_header_id|>{role}<|end_header_id|>\n\n");
    let turn = |role: &str| format!("<|eot_id|>{}", head(role));
    let [begin, system] = ["user", "system"].map(|role| format!("<s>{}", head(role)));
    assert_eq!(
        template(LLAMA3).pieces().unwrap(),
        ChatPieces {
            trims_system: true,
            trims_user: true,
            trims_answer: true,
            ..pieces(&begin, Some([&system, &turn("user")]), &turn("assistant"), &turn("user"))
        }
    );

    let turn = |role: &str| format!("<end_of_turn>\n<start_of_turn>{role}\n");
    let begin = "<s><start_of_turn>user\n";
    let gemma = |system| ChatPieces {
        trims_user: true,
        trims_answer: true,
        ..pieces(begin, system, &turn("model"), &turn("user"))
    };
    assert_eq!(template(GEMMA3).pieces().unwrap(), gemma(Some([begin, "\n\n"])));
    assert_eq!(template(GEMMA2).pieces().unwrap(), gemma(None));

    let (answer, next) = ("<|end|>\n<|assistant|>\n", "<|end|>\n<|user|>\n");
    assert_eq!(
        template(PHI3).pieces().unwrap(),
        pieces("<|user|>\n", Some(["<|system|>\n", next]), answer, next)
    );
    let system = ["<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"];
    assert_eq!(
        template(LLAMA2).pieces().unwrap(),
        ChatPieces {
            trims_answer: true,
            answered: " [/INST] ".into(),
            ..pieces("<s>[INST] ", Some(system), " [/INST]", " </s><s>[INST] ")
        }
    );
    assert_eq!(template(MISTRAL).pieces().unwrap(), pieces("<s>[INST] ", None, " [/INST]", "</s>[INST] "));
    let (answer, next) = ("</s>\n<|assistant|>\n", "</s>\n<|user|>\n");
    assert_eq!(
        template(TINYLLAMA).pieces().unwrap(),
        pieces("<|user|>\n", Some(["<|system|>\n", next]), answer, next)
    );
}

#[test]
fn templates_that_do_more_are_refused() {
    let refusal = |source: &str| template(source).pieces().unwrap_err().to_string();
    // Only the last message of the user is framed.
    let last = "{% for m in messages %}{{ '[' + m.content + ']' if loop.last else m.content }};{% endfor %}";
    assert_eq!(
        refusal(last),
        "the chat template is not fixed texts between messages: \
         after 1 turns it writes \"What is 2 + 2?;Two lines\" where fixed texts give \"[What is 2 + 2?;Two line\""
    );
    let numbered = "{% for m in messages %}{{ loop.index }}. {{ m.content }}\n{% endfor %}";
    assert!(refusal(numbered).contains("after 2 turns"), "{}", refusal(numbered));
    let upper = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
    assert!(refusal(upper).contains("leaves out a message"), "{}", refusal(upper));
    let quoted = "{% for m in messages %}{{ m.content | tojson }}{% endfor %}";
    assert!(refusal(quoted).contains("after 0 turns"), "{}", refusal(quoted));
    assert!(refusal("{% for").starts_with("chat template: syntax error"), "{}", refusal("{% for"));
    let raising = "{{ raise_exception('tools only') }}";
    assert!(refusal(raising).contains("tools only"), "{}", refusal(raising));
}
