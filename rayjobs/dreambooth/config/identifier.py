"""The words of a prompt that mean its subject.

Owns how they are found, and whether a prompt goes with its class's. Knows no other keys.
"""

ARTICLES = {"a", "an", "the", "my"}
FRAMES = {
    "photo",
    "photograph",
    "picture",
    "image",
    "painting",
    "drawing",
    "portrait",
    "style",
    "of",
}
"""Words of a prompt that name no subject."""


def check_pair(key: str, prompt: str, class_key: str, class_prompt: str | None) -> None:
    """A subject's prompt must be that of its class with an identifier."""
    words, class_words = prompt.split(), (class_prompt or "").split()
    if not class_words:
        raise ValueError(
            f"{class_key} is missing: the class, as in 'a photo of dog' for {key} 'a photo of sks "
            "dog'; or set prior.mode=none"
        )
    if class_words[-1] not in words:
        raise ValueError(
            f"{key} {prompt!r} lacks the class word {class_words[-1]!r} of {class_key} "
            f"{class_prompt!r}"
        )
    if not identifier_in(prompt, str(class_prompt)):
        raise ValueError(
            f"{key} {prompt!r} has no word that {class_key} lacks; put an identifier such as sks "
            "before the class word"
        )


def identifier_in(instance_prompt: str, prior_prompt: str) -> str:
    """The words that the class's prompt lacks, which mean the subject.

    Without that prompt a guess: what is left of "a photo of sks dog" without its last word.
    """
    known = set(prior_prompt.split()) | ARTICLES
    if prior_prompt:
        return " ".join(w for w in instance_prompt.split() if w not in known)
    words = [w for w in instance_prompt.split() if w.lower() not in known | FRAMES]
    return " ".join(words[:-1] or words)
