"""Between text and tokens: messages, tokens and back, chat templates, and the text of tokens as they come."""
