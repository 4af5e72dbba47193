"""Answers that may call one tool at most, for clients that can't run several side by side."""

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
