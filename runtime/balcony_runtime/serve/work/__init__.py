"""Work: the replies in progress, the thread that decodes them, their answers, and what is counted of them."""
