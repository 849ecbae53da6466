//! Streamed text equals whole text, for any text cut anywhere, for every tokenizer here.
//! `HEADSTART_TEXT_CASES` sets the number of cases.

mod common;

use headstart_text::{
    Detokenizer, DraftEncoder, Message, Role, Tokenizer, encode_draft, plain_prompt,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn cases(default: u32) -> ProptestConfig {
    let set = std::env::var("HEADSTART_TEXT_CASES").ok().and_then(|n| n.parse().ok());
    ProptestConfig {
        cases: set.unwrap_or(default),
        max_shrink_iters: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn bits() -> impl Strategy<Value = String> {
    let words = select(vec![
        "I'll",
        "we've",
        "'",
        "'l",
        "'ll",
        "'S",
        "ſ",
        "don't",
        " the",
        "The",
        " capital",
        "of",
        "function",
        " government",
        " information",
        "international",
        " x",
        "a",
        "b",
        "aa",
        "ab",
        "aaaaaaaa",
        "Zürich",
        "naïve",
        "ﬁ",
        "１２",
        "don",
        "123",
        "1",
        "22",
        "٣٤",
        "½",
        "Ⅷ",
        "3.14",
        "你好",
        "中国",
        "没有",
        "的",
        "，",
        "。",
        "ございます",
        "テキスト",
        "한국어",
        "ㅎㅏㄴ",
        "ภาษาไทย",
        "हिन्दी",
        "עברית",
    ]);
    let spaces = select(vec![
        " ", "  ", "   ", "        ", "\n", "\n\n", "\n\n\n", " \n", "\n ", "\r\n", "\t", "\t\t",
        "\u{a0}", "\u{3000}", "\u{2003}", "\u{85}", "\u{2028}", "\r",
    ]);
    let marks = select(vec![
        "\u{301}", "\u{323}", "\u{307}", "\u{338}", "\u{1100}", "\u{1161}", "\u{11a8}", "가",
        "e\u{301}", "\u{212b}", "\u{212a}", "\u{37e}", "\u{958}", "\u{3099}", "か", "\u{0c46}",
        "\u{0c56}", "\u{1112}", "\u{fe0f}", "\u{200d}", "\u{200b}", "\u{feff}", "\u{0}", "\u{4}",
        "\u{fffd}", "=", "<",
    ]);
    let emoji = select(vec![
        "👩\u{200d}👩\u{200d}👧\u{200d}👦",
        "👍🏽",
        "🏳\u{fe0f}\u{200d}🌈",
        "🇫🇷",
        "😀",
        "❤\u{fe0f}",
        "𝔘𝔫𝔦",
        "𐐷",
        "☃",
    ]);
    let code = select(vec![
        "def f(x):\n    return x",
        "{}",
        "();",
        "->",
        "===",
        "!!",
        "!",
        "...",
        "/*",
        "*/",
        "#",
        "```",
        "\"",
        "[",
        "]",
        "[User]",
        "\\n",
        "::",
        "<<",
        "--",
        "__init__",
        "&&",
        "$",
    ]);
    let added = select(vec![
        "<|im_start|>",
        "<|im_end|>",
        "<|im_",
        "<|",
        "<|endoftext|>",
        "<s>",
        "</s>",
        "<unk>",
        "<tool>",
        "<to",
        "<tool_call>",
        "<div>",
        "<div",
        "▁",
        "▁▁",
        "▁▁▁",
        "<0x0A>",
        "<|im_end|",
        "|>",
    ]);
    prop_oneof![
        6 => words.prop_map(str::to_owned),
        5 => spaces.prop_map(str::to_owned),
        3 => marks.prop_map(str::to_owned),
        2 => emoji.prop_map(str::to_owned),
        3 => code.prop_map(str::to_owned),
        2 => added.prop_map(str::to_owned),
        2 => "[\u{4e00}-\u{4fff}]{1,12}",
        1 => "[a-zA-Z]{1,30}",
        1 => "[=!#']{1,20}",
        1 => "\\PC{0,4}",
        1 => any::<char>().prop_map(String::from),
    ]
}

fn text() -> impl Strategy<Value = String> {
    proptest::collection::vec(bits(), 0..14).prop_map(|bits| bits.concat())
}

fn prompt() -> impl Strategy<Value = String> {
    prop_oneof![
        5 => text().prop_map(|content| plain_prompt(&[Message::new(Role::User, content)])),
        2 => text().prop_map(|content| format!("<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n")),
        1 => Just(String::new()),
        // No clean boundary, most of the time.
        2 => text(),
    ]
}

fn tokenizer() -> impl Strategy<Value = &'static (String, Tokenizer)> {
    select((0..common::all().len()).collect::<Vec<_>>()).prop_map(|i| &common::all()[i])
}

/// The pieces of a text that is cut at these places.
fn pieces(text: &str, cuts: &[Index]) -> Vec<String> {
    let bounds: Vec<usize> = (0..=text.len()).filter(|&i| text.is_char_boundary(i)).collect();
    let mut at: Vec<usize> = cuts.iter().map(|cut| bounds[cut.index(bounds.len())]).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| text[pair[0]..pair[1]].to_owned()).collect()
}

fn stream(tokenizer: &Tokenizer, prompt: &str, pieces: &[String]) -> (Vec<u32>, bool) {
    let prompt_ids = tokenizer.encode(prompt).unwrap();
    let mut encoder = DraftEncoder::new(tokenizer, prompt, &prompt_ids).unwrap();
    let mut ids = Vec::new();
    for piece in pieces {
        ids.extend(encoder.push(piece).unwrap());
    }
    ids.extend(encoder.finish().unwrap());
    assert!(encoder.push("more").unwrap().is_empty() && encoder.finish().unwrap().is_empty());
    (ids, encoder.clean_boundary())
}

proptest! {
    #![proptest_config(cases(6000))]

    #[test]
    fn a_streamed_draft_is_the_whole_draft(
        named in tokenizer(),
        prompt in prompt(),
        text in text(),
        cuts in proptest::collection::vec(any::<Index>(), 0..12),
        each_char in any::<bool>(),
    ) {
        let (name, tokenizer) = named;
        let pieces = match each_char {
            true => text.chars().map(String::from).collect(),
            false => pieces(&text, &cuts),
        };
        let expected = encode_draft(tokenizer, &prompt, &text).unwrap();
        prop_assert_eq!(stream(tokenizer, &prompt, &pieces), expected, "{}", name);
    }

    /// The whole way: one model's tokens to text, that text to the other's tokens; tokens end anywhere in
    /// a character.
    #[test]
    fn a_draft_in_another_models_tokens_is_the_whole_draft(
        from in tokenizer(),
        to in tokenizer(),
        text in text(),
        noise in proptest::collection::vec((any::<Index>(), any::<Index>()), 0..4),
    ) {
        let mut ids = from.1.encode(&text).unwrap();
        for (at, id) in noise {
            ids.insert(at.index(ids.len() + 1), id.index(from.1.vocab_size()) as u32);
        }
        let mut detokenizer = Detokenizer::new(&from.1);
        let mut pieces: Vec<String> = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push(detokenizer.finish());
        let whole = from.1.decode(&ids);
        prop_assert_eq!(pieces.concat(), &*whole, "{}", from.0);
        let prompt = "\n\n[User]\nHi there\n\n[Assistant]\n";
        let expected = encode_draft(&to.1, prompt, &whole).unwrap();
        prop_assert_eq!(stream(&to.1, prompt, &pieces), expected, "{} to {}", from.0, to.0);
    }

    #[test]
    fn ids_piece_by_piece_are_the_whole_text(
        named in tokenizer(),
        ids in proptest::collection::vec(any::<Index>(), 0..40),
        split in any::<Index>(),
    ) {
        let tokenizer = &named.1;
        let ids: Vec<u32> = ids.iter().map(|i| i.index(tokenizer.vocab_size() + 5) as u32).collect();
        let whole = tokenizer.decode(&ids);
        let mut detokenizer = Detokenizer::new(tokenizer);
        let mut text = String::new();
        for &id in &ids {
            text.push_str(&detokenizer.push(id));
            prop_assert!(whole.starts_with(&text), "{}", named.0);
        }
        text.push_str(&detokenizer.finish());
        prop_assert_eq!(&text, &whole, "{}", named.0);

        let at = split.index(ids.len() + 1);
        let mut first = Detokenizer::new(tokenizer);
        let mut text: String = ids[..at].iter().map(|&id| first.push(id)).collect();
        let mut second = Detokenizer::after(tokenizer, &ids[..at]);
        text.extend(ids[at..].iter().map(|&id| second.push(id)));
        text.push_str(&second.finish());
        prop_assert_eq!(&text, &whole, "{}", named.0);
    }
}

proptest! {
    #![proptest_config(cases(600))]

    /// Latency: however long a text without spaces is, only its end is held back.
    #[test]
    fn text_without_spaces_streams(named in tokenizer(), text in "[\u{4e00}-\u{9fff}]{40,160}") {
        let held_max = held_max(&named.1, &text);
        prop_assert!(held_max <= 16, "{}: {} characters held back", named.0, held_max);
    }

    #[test]
    fn plain_words_stream(named in tokenizer(), words in proptest::collection::vec("[a-z]{1,9}", 4..30)) {
        let held_max = held_max(&named.1, &words.join(" "));
        prop_assert!(held_max <= 40, "{}: {} characters held back", named.0, held_max);
    }
}

/// The most characters that were ever held back while the text came one by one.
fn held_max(tokenizer: &Tokenizer, text: &str) -> usize {
    let prompt = "\n\n[Assistant]\n";
    let prompt_ids = tokenizer.encode(prompt).unwrap();
    let mut encoder = DraftEncoder::new(tokenizer, prompt, &prompt_ids).unwrap();
    let (mut bytes_in, mut bytes_out, mut held_max) = (0, 0, 0);
    for c in text.chars() {
        let ids = encoder.push(&c.to_string()).unwrap();
        bytes_in += c.len_utf8();
        bytes_out += ids.iter().map(|&id| tokenizer.token_bytes(id).len()).sum::<usize>();
        let char_bytes = c.len_utf8().max(1);
        held_max = held_max.max((bytes_in - bytes_out.min(bytes_in)) / char_bytes);
    }
    held_max
}

#[test]
fn real_chinese_streams_within_a_few_characters() {
    let text = "中文没有空格的文本也必须能够流式传输否则用户会等待很久今天天气很好我们去公园散步吧"
        .repeat(3);
    for (name, tokenizer) in common::all() {
        let held = held_max(tokenizer, &text);
        assert!(held <= 12, "{name}: {held}");
    }
}

#[test]
fn the_first_words_are_given_out_while_more_come() {
    for (name, tokenizer) in common::all() {
        let prompt = "\n\n[User]\nHi\n\n[Assistant]\n";
        let mut encoder =
            DraftEncoder::new(tokenizer, prompt, &tokenizer.encode(prompt).unwrap()).unwrap();
        let first = encoder.push("The capital of France is Par").unwrap();
        let whole = encode_draft(tokenizer, prompt, "The capital of France is Paris.").unwrap().0;
        assert!(
            whole.starts_with(&first) && tokenizer.decode(&first).len() >= 14,
            "{name}: {first:?}"
        );
    }
}

/// With a pattern that cuts the text, a word is given out with the first character that ends it.
#[test]
fn a_word_waits_for_one_character_more() {
    let prompt = "\n\n[User]\nHi\n\n[Assistant]\n";
    // What is there, and the text whose tokens are certain then.
    let cases = [
        ("Sure,", "Sure"),
        ("Sure 1", "Sure"),
        ("I'", "I"),
        ("I'l", "I"),
        ("Go. On", "Go."),
        ("Go.\n", "Go"),
        ("你好，世", "你好"),
    ];
    let whole = ["stories260k", "gemma_like"];
    let cut = |name: &str| !whole.contains(&name) && !name.starts_with("metaspace");
    for (name, tokenizer) in common::all().iter().filter(|(name, _)| cut(name)) {
        for (there, certain) in cases {
            let ids = tokenizer.encode(prompt).unwrap();
            let mut encoder = DraftEncoder::new(tokenizer, prompt, &ids).unwrap();
            let out = encoder.push(there).unwrap();
            let text = tokenizer.decode(&out);
            assert!(text.starts_with(certain), "{name}: {there:?} gave out {text:?}");
        }
    }
}

#[test]
fn ids_of_another_prompt_are_refused() {
    for (name, tokenizer) in common::all() {
        let ids = tokenizer.encode("one prompt\n").unwrap();
        assert!(DraftEncoder::new(tokenizer, "one problem\n", &ids).is_err(), "{name}");
        assert!(
            DraftEncoder::new(tokenizer, "one prompt\n", &ids[..ids.len() - 1]).is_err(),
            "{name}"
        );
        let with_bos: Vec<u32> = std::iter::once(7).chain(ids).collect();
        assert!(DraftEncoder::new(tokenizer, "one prompt\n", &with_bos).is_ok(), "{name}");
    }
}

#[test]
fn tokens_that_take_white_space_away_wait_for_the_whole_text() {
    let tokenizer = common::changed(&common::small_byte_level("qwen2"), |json| {
        json["added_tokens"][0]["lstrip"] = true.into();
        json["added_tokens"][0]["rstrip"] = true.into();
        json["added_tokens"][1]["single_word"] = true.into();
    });
    let prompt = "\n\n[User]\nHi there\n\n[Assistant]\n";
    for draft in
        ["one two <|im_start|> three", "x<|im_end|>y <|im_end|> z", "<|im_sta", "a  <|im_start|>"]
    {
        let expected = encode_draft(&tokenizer, prompt, draft).unwrap();
        let pieces: Vec<String> = draft.chars().map(String::from).collect();
        assert_eq!(stream(&tokenizer, prompt, &pieces), expected, "{draft:?}");
    }
}
