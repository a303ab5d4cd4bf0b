"""Conversations as the extractor reads them."""

from dataclasses import replace

from oel_jax.data.history import history
from oel_jax.data.messages import user
from oel_jax.data.trajectories import Trajectory, Transcript


def talk(*texts, feedback=None):
    transcript, messages = Transcript(), []
    for asked, answered in zip(texts[::2], texts[1::2], strict=True):
        messages.append(user(asked))
        messages.append(transcript.add(messages, answered).shown)
    turns = transcript.turns
    turns[-1] = replace(turns[-1], feedback=feedback)
    return Trajectory(policy="p", purpose="deploy", turns=turns, id="c")


def test_whole_conversations_have_roles_and_feedback():
    assert history(talk("Hi", "Hello", "Shorter!", "Hey", feedback="Good.")) == (
        "\nuser: Hi\n\nassistant: Hello\n\nuser: Shorter!\n\nassistant: Hey\n\n"
        "feedback of the user: Good.\n"
    )


def test_reactions_are_what_came_after_each_answer():
    one = talk("Hi", "Hello", "Shorter!", "Hey", feedback="Good.")
    assert history(one, reactions=True) == '- "Shorter!"\n- "Good."'
    assert history(talk("Hi", "Hello"), reactions=True) == ""


def test_calls_of_tools_are_shown():
    call = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    transcript = Transcript()
    transcript.add([user("Weather?")], "", answer=answer)
    one = Trajectory(policy="p", purpose="deploy", turns=transcript.turns, id="c")
    assert history(one) == '\nuser: Weather?\n\nassistant: [calls weather: {"city": "Rome"}]\n'
