use std::time::Duration;

use super::*;
use crate::Role;

fn render(source: &str, messages: &[Message]) -> Result<String, TextError> {
    let tokens = TemplateTokens {
        bos_token: Some("<s>".into()),
        eos_token: Some("</s>".into()),
        ..TemplateTokens::default()
    };
    ChatTemplate::new(source, tokens)?.render(messages)
}

fn hi() -> Vec<Message> {
    vec![Message::new(Role::User, "Hi <b>\"é\"</b>")]
}

#[test]
fn blocks_are_trimmed_as_transformers_does() {
    let source = "{{ bos_token }}\n  {% for m in messages %}\n[{{ m.role }}] {{ m['content'] }}\n  {% endfor %}\n{% if add_generation_prompt %}\nA:\n{% endif %}\n";
    assert_eq!(render(source, &hi()).unwrap(), "<s>\n[user] Hi <b>\"é\"</b>\nA:\n");
}

#[test]
fn python_methods_and_loop_controls() {
    let source = "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content.strip().upper().split(' ')[0] }}{% break %}{% endfor %}";
    let messages = [Message::new(Role::System, "no"), Message::new(Role::User, " go on ")];
    assert_eq!(render(source, &messages).unwrap(), "GO");
}

#[test]
fn a_raised_exception_is_the_clients_and_in_its_own_words() {
    let source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}ok";
    let system = [Message::new(Role::System, "x")];
    let error = render(source, &system).unwrap_err();
    assert!(error.client_fault(), "{error:?}");
    assert!(error.to_string().ends_with("System role not supported"), "{error}");
    assert_eq!(render(source, &hi()).unwrap(), "ok");
}

#[test]
fn a_raised_exception_inside_a_macro_is_found_too() {
    let source = "{% macro f() %}{{ raise_exception('deep') }}{% endmacro %}{{ f() }}";
    assert!(matches!(render(source, &hi()), Err(TextError::Messages(m)) if m == "deep"));
}

#[test]
fn other_failures_are_not_the_clients() {
    for source in ["{{ messages.nothing.at.all }}", "{{ unknown() }}"] {
        let error = render(source, &hi()).unwrap_err();
        assert!(matches!(error, TextError::Template(_)) && !error.client_fault(), "{error:?}");
    }
    assert!(matches!(render("{% for %}", &hi()), Err(TextError::Template(_))));
}

#[test]
fn endless_templates_are_refused() {
    let error = render(
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        &hi(),
    );
    assert!(matches!(error, Err(TextError::Template(_))), "{error:?}");
    let error = render("{% for i in range(90000) %}{{ '0123456789' * 100 }}{% endfor %}", &hi());
    assert!(matches!(error, Err(TextError::Template(_))), "{error:?}");
    let long = " ".repeat(TEMPLATE_BYTES_MAX + 1);
    assert!(matches!(
        ChatTemplate::new(&long, TemplateTokens::default()),
        Err(TextError::Template(_))
    ));
}

#[test]
fn a_tag_that_is_none_stays_as_it_is() {
    assert!(render("a {%} b", &hi()).is_err());
    assert_eq!(render("a {# {% #} b", &hi()).unwrap(), "a  b");
    assert_eq!(render("{{ '{%' }} {# %} #}", &hi()).unwrap(), "{% ");
}

#[test]
fn generation_blocks_change_nothing() {
    let source =
        "a {%- generation -%} b {%- endgeneration %} c{% generation %}\nd{% endgeneration %}";
    assert_eq!(render(source, &hi()).unwrap(), "ab cd");
}

#[test]
fn json_is_pythons() {
    let source = "{{ messages | tojson }}";
    assert_eq!(
        render(source, &hi()).unwrap(),
        r#"[{"role": "user", "content": "Hi <b>\"é\"</b>"}]"#
    );
    let source = "{{ {'a': [1, 2]} | tojson(indent=2) }}";
    assert_eq!(render(source, &hi()).unwrap(), "{\n  \"a\": [\n    1,\n    2\n  ]\n}");
}

#[test]
fn what_is_not_given_is_none_or_undefined() {
    let source = "{% if tools is not none %}tools{% endif %}{% if pad_token is defined %}pad{% endif %}{{ eos_token }}";
    assert_eq!(render(source, &hi()).unwrap(), "</s>");
}

#[test]
fn dates() {
    let at = |days: u64, seconds: u64| UNIX_EPOCH + Duration::from_secs(days * 86_400 + seconds);
    assert_eq!(strftime("%d %b %Y", at(0, 0)), "01 Jan 1970");
    // 2024-02-29 was a Thursday, day 19782.
    assert_eq!(
        strftime("%A %-%Y-%m-%d %H:%M:%S %I %p %%", at(19_782, 47_045)),
        "Thursday %-2024-02-29 13:04:05 01 PM %"
    );
    assert_eq!(strftime("%B %d, %y%", at(20_780, 0)), "November 23, 26%");
    let now = render("{{ strftime_now('%Y') }}", &hi()).unwrap();
    assert!(now.parse::<u32>().unwrap() >= 2024, "{now}");
    // What a template repeats does not become a date of the same size.
    let error = render("{{ strftime_now('%d' * 600) }}", &hi()).unwrap_err().to_string();
    assert!(error.contains("at most 1024 bytes"), "{error}");
}
