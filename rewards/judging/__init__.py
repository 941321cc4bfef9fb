"""Vision-language models as judges: how they are asked, how an answer becomes a score, and what answers."""
