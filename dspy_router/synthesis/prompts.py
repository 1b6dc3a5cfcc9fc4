"""What the LM is asked: two signatures, and the styles in which requests are written."""

import dspy

# The name of a style is part of an example's origin; its text is what the LM reads.
STYLES = {
    "terse": "a few keywords, no full sentence",
    "polite": "one polite, complete sentence",
    "indirect": "the need or the situation alone, without saying what should be done about it",
    "detailed": "concrete details such as names, places, dates or numbers",
    "typos": "typed in haste: lower case, abbreviations, one or two typing errors",
    "embedded": "part of a longer message of two or three sentences that also says other things",
}


class WriteRequests(dspy.Signature):
    """Write realistic requests, as users would send them to a system that decides on one option for each request.

    Every request must clearly call for the given option and for none of the others. Requests must differ from one
    another, and from those already written, in what they are about and in wording, not in details alone. Write bare
    requests: no numbering, no quotation marks, no comments, and never the option's own name as an identifier.
    """

    task: str = dspy.InputField(desc="what the system does")
    decision: str = dspy.InputField(desc="what the system decides for each request")
    option: str = dspy.InputField(desc="the option that every request must call for")
    others: list[str] = dspy.InputField(desc="other options; no request may call for one of them")
    style: str = dspy.InputField(desc="how the requests are to be phrased")
    count: int = dspy.InputField(desc="how many requests to write")
    batch: int = dspy.InputField(desc="which batch for this option this is; later ones cover what earlier ones did not")
    written: list[str] = dspy.InputField(desc="requests already written for this option; write none like them")
    requests: list[str] = dspy.OutputField(desc="the requests, one string each")


class WriteHardRequests(WriteRequests):
    """Write realistic requests that are easy to mistake, as users would send them to a system that decides on one
    option for each request.

    Every request must call for the given option and not for its rival, beyond doubt to a careful reader, and yet
    sound near to the rival: by the rival's words, topic or situation. Requests must differ from one another, and from
    those already written, in what they are about and in wording, not in details alone. Write bare requests: no
    numbering, no quotation marks, no comments, and never an option's own name as an identifier.
    """

    rival: str = dspy.InputField(desc="the option that the requests sound near to and must not call for")
