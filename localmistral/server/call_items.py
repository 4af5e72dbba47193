"""What some clients need of the tool calls in an answer: one at most, or each in one piece."""

from collections.abc import AsyncIterator
from dataclasses import replace

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.chatformat.parser import ToolCallDelta


async def end_after_one_call(
    stream: ChatStream, items: AsyncIterator[ChatItem]
) -> AsyncIterator[ChatItem]:
    """`items` of `stream` up to the first call: the beginning of a second one ends the answer."""
    is_ended = False
    async for item in items:
        if isinstance(item, ToolCallDelta) and item.index > 0:
            is_ended = True
            stream.close()
        elif isinstance(item, ChatResult) and is_ended:
            yield replace(item, tool_calls=item.tool_calls[:1], finish_reason="tool_calls")
        elif isinstance(item, ChatResult) or not is_ended:
            yield item


async def join_calls(items: AsyncIterator[ChatItem]) -> AsyncIterator[ChatItem]:
    """`items` with every call in one piece, when it is complete: Mistral's way."""
    held: ToolCallDelta | None = None
    async for item in items:
        if isinstance(item, ToolCallDelta) and held is not None and item.index == held.index:
            held = replace(held, arguments=held.arguments + item.arguments)
            continue
        if held is not None:
            yield held
        held = item if isinstance(item, ToolCallDelta) else None
        if held is None:
            yield item
