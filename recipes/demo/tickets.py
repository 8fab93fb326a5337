"""Made-up support requests and the JSON tickets they should become: the demo's data, from a seed.

A request is put together from parts: an opening, a complaint that one team deals with, a reference
to the order, and perhaps a word on how much it hurries. Held-out requests are built from parts and
values of their own: no complaint, opening, reference, urgency, product or order number of theirs
occurs in training (``tests/unit/test_tickets.py`` proves it). So a right answer means that the
model understood a wording it was not taught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

Row = dict[str, list[dict[str, str]]]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


@dataclass(frozen=True)
class Parts:
    """The wordings and values that one split is made of."""

    complaints: dict[str, tuple[str, ...]]  # by team; each names the {item}
    references: tuple[str, ...]  # each names the {order}
    urgent: tuple[str, ...]
    calm: tuple[str, ...]
    openings: tuple[str, ...]
    items: tuple[str, ...]


TRAIN = Parts(
    complaints={
        "billing": _lines("""
            I was charged twice for the {item}
            the invoice for my {item} shows the wrong amount
            you billed my card for a {item} I cancelled
            I still wait for the refund of my {item}
            the discount code was not applied to the {item}
            my bank statement lists the {item} two times
            I need a receipt for the {item} with our VAT number
            the price of the {item} on the bill is too high
            please explain the extra fee for the {item}
            I paid for the {item} but the payment shows as open
            you took too much money for the {item}
            my credit card was debited again for the {item}
            the tax on the {item} was calculated wrongly
            I got a payment reminder although the {item} is paid
            when will the money for the {item} be paid back?
            the coupon for the {item} made no difference to the total
            I want to pay for the {item} by bank transfer instead
            the amount for the {item} is not what the shop showed
            the payment for my {item} failed but the money is gone
            I sent the {item} back and have not seen my money yet
            you put the {item} on the bill of my company by mistake
            can I pay for the {item} in three instalments?
            the receipt of the {item} has the wrong name on it
            why does the {item} cost more than on the day I bought it?
            my gift card was not used for the {item}
            please cancel the direct debit for the {item}
        """),
        "delivery": _lines("""
            my {item} has not arrived
            the parcel with the {item} is a week late
            tracking for the {item} has not moved for days
            the courier left the {item} at the wrong address
            the box with my {item} was empty
            you sent me a different product than the {item}
            when will the {item} be shipped?
            the driver never rang the bell with my {item}
            the package with the {item} got lost
            please send the {item} to another address
            my neighbour got the {item} that was meant for me
            the tracking link for the {item} does not show anything
            nobody delivered the {item} yesterday
            I am still waiting for the {item} to come
            the {item} was sent back to your warehouse
            can the carrier bring the {item} on Saturday?
            only half of the {item} was in the parcel
            the {item} is stuck in customs
            the {item} is announced for today but nobody came
            the mailman brought a box, but it was not the {item}
            could you ship the {item} by express?
            the {item} has been on its way for two weeks
            I moved house, so the {item} goes to the old address
            the delivery date of the {item} was put off again
            please leave the {item} with the people next door
            I was at home, but the {item} was not handed over
        """),
        "repair": _lines("""
            the {item} stopped working
            my {item} does not turn on any more
            the {item} makes a loud noise
            the screen of the {item} is cracked
            a button of the {item} fell off
            the {item} smells burnt when I use it
            my {item} leaks water
            the {item} gets far too hot
            the {item} has a broken hinge
            my {item} switches itself off after a minute
            the {item} shows error E4
            the battery of the {item} is dead after one day
            I need a spare part for my {item}
            the cable of the {item} is damaged
            the {item} vibrates so much that it moves
            the lid of my {item} does not close
            the {item} is defective
            can someone fix my {item} under warranty?
            the {item} broke when I used it for the first time
            I pressed the switch of the {item} and nothing happened
            there is a crack in the {item}
            the motor of my {item} is stuck
            the {item} gives me an electric shock
            the light of the {item} only blinks red
            one wheel of the {item} is loose
            the {item} fell apart, please mend it or replace it
        """),
        "account": _lines("""
            I cannot log in to see my {item}
            I forgot my password since buying the {item}
            please change the email address of my profile, I bought a {item}
            the website does not accept my password to register the {item}
            my account is locked since I bought the {item}
            I want to delete my account after the {item}
            the code to sign in never comes, I only want to look up my {item}
            someone else used my login to buy a {item}
            please merge my two user accounts, one holds the {item}
            my user name is spelled wrong in the profile with the {item}
            I never got the mail to confirm my registration for the {item}
            how do I turn on two-factor login for the profile with my {item}?
            the reset link is expired and I cannot view my {item}
            please update the phone number in my profile, the {item} is listed there
            it says unknown user when I sign in for my {item}
            I was logged out and cannot get back in to my {item}
            please stop the newsletter that I get since the {item}
            my profile shows the {item} of a stranger
            I have a new phone and cannot get the login code for my {item}
            my password was changed by somebody, and now I cannot see the {item}
            registering with my mail address fails, so I cannot add my {item}
            please correct my date of birth in the profile, I own a {item}
            the app signs me out each time I open the page of my {item}
            I want another user name than the one I took with the {item}
            my login was blocked after I rated the {item}
            please remove my personal data, I no longer have the {item}
        """),
    },
    references=_lines("""
        order {order}
        my order number is {order}
        it is order no. {order}
        the number is {order}
        see order {order}
        order ID {order}
        this is about {order}
        I ordered under {order}
        order #{order}
        reference {order}
        the order in question is {order}
        concerning order {order}
        ticket for {order}
        order code {order}
        you will see it in {order}
        it has the number {order}
    """),
    urgent=_lines("""
        this is urgent
        please hurry
        I need this today
        it cannot wait
        please answer at once
        as soon as possible please
        this is an emergency
        I need help right now
        by tomorrow at the latest
        very urgent
        I have no time to lose
        please deal with this first
        call me back straight away
        I must have a solution tonight
        please react within the hour
        time is short
        I cannot wait any longer
        top priority please
    """),
    calm=_lines("""
        no hurry
        take your time
        it can wait
        next week is fine
        whenever you have time
        this is not urgent
        there is no rush
        any time this month is fine
        I can wait
        answer when it suits you
        this has time
        it is only a small matter, so do not rush
        there is no need to be fast
        some day soon will do
        please do not hurry for me
        a late answer is fine
    """),
    openings=_lines("""
        hello
        hi there
        good morning
        dear team
        hi
        good day
        hello support
        excuse me
        to whom it may concern
        dear sir or madam
        hello everyone
        a quick question
    """),
    items=_lines("""
        desk lamp
        coffee maker
        office chair
        toaster
        winter jacket
        keyboard
        bike helmet
        rice cooker
        phone case
        blender
        garden hose
        headset
        bookshelf
        water bottle
        electric drill
        camping tent
        baby monitor
        wall clock
        printer
        yoga mat
        vacuum cleaner
        alarm clock
        frying pan
        smart watch
        sewing machine
        folding table
        hair dryer
        suitcase
        projector
        bread knife
        laptop bag
        electric kettle
        garden chair
        steam iron
        picture frame
        dining table
        ice cream maker
        dish rack
        fitness bike
        air fryer
        memory card
        night light
        wine glass
        travel mug
        paper shredder
        guitar stand
        game console
        soup bowl
        ladder
        carpet
        radio
        door bell
    """),
)

HELDOUT = Parts(
    complaints={
        "billing": _lines("""
            there are two charges on my card for one {item}
            the sum on the invoice for the {item} is wrong
            where is my refund for the {item}?
            I was asked to pay for the {item} a second time
            my bill lists a fee for the {item} that nobody told me about
            the voucher did not lower the price of the {item}
            could you send me the invoice for the {item} again?
            I overpaid for the {item} and want the difference back
        """),
        "delivery": _lines("""
            where is the parcel with my {item}?
            the {item} should have been delivered on Monday
            the {item} went to somebody else's address
            the package came without the {item} inside
            how long does shipping of the {item} take?
            the courier says he dropped off the {item}, but it is not here
            my tracking number for the {item} is not known to the carrier
            I got the wrong parcel, there was no {item} in it
        """),
        "repair": _lines("""
            my {item} is broken
            the {item} no longer starts
            there is smoke coming out of the {item}
            the handle of the {item} came off
            the {item} worked for two days and then died
            my {item} keeps making a strange noise
            the {item} has a fault, does the warranty cover it?
            the display of my {item} stays black
        """),
        "account": _lines("""
            my password is rejected, so I cannot look at my {item}
            I am locked out of my account with the {item}
            how can I reset my password to find the {item}?
            please put my new email address into the profile with the {item}
            I am unable to sign in and check on the {item}
            please close my account, the {item} was my last purchase
            a stranger logged in to my profile and saw the {item}
            the login page for my {item} says that I do not exist
        """),
    },
    references=_lines("""
        the order is {order}
        you find it under order {order}
        order number: {order}
        it was order {order}
        my reference is {order}
    """),
    urgent=_lines("""
        I need an answer today
        this really is urgent
        please be quick
        this cannot wait until tomorrow
        please help me immediately
    """),
    calm=_lines("""
        I am in no hurry
        it is not urgent at all
        please take all the time you need
        next month is fine too
    """),
    openings=_lines("""
        good evening
        hey
        dear support team
        greetings
    """),
    items=_lines("""
        floor lamp
        espresso machine
        rocking chair
        waffle iron
        rain coat
        computer mouse
        ski mask
        pressure cooker
        tablet stand
        hand mixer
        lawn mower
        loudspeaker
        shoe rack
        lunch box
        circular saw
        sleeping bag
    """),
)

HELDOUT_ORDERS = 7
"""Order numbers that this divides are held out; no digit gives them away."""


def train_rows(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` conversations of the training wordings; equal arguments give equal rows."""
    return _rows(TRAIN, rows, random.Random(f"train {seed}"), heldout=False)


def heldout_rows(rows: int, seed: int) -> Iterator[Row]:
    """Yield ``rows`` conversations whose wordings and values training never sees."""
    return _rows(HELDOUT, rows, random.Random(f"heldout {seed}"), heldout=True)


def _rows(parts: Parts, rows: int, rng: random.Random, *, heldout: bool) -> Iterator[Row]:
    teams = sorted(parts.complaints)
    for index in range(rows):
        team = teams[index % len(teams)]  # balanced, so that guessing one team gains nothing
        urgent = rng.random() < 0.5
        item, order = rng.choice(parts.items), _order(rng, heldout=heldout)
        request = _request(parts, team, rng, urgent=urgent).format(item=item, order=order)
        ticket = {"team": team, "urgent": urgent, "order": order}
        answer = json.dumps(ticket, separators=(",", ":"))
        yield {"messages": [_message("user", request), _message("assistant", answer)]}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _order(rng: random.Random, *, heldout: bool) -> str:
    while True:
        number = rng.randrange(10_000, 100_000)
        if (number % HELDOUT_ORDERS == 0) == heldout:
            return str(number)


def _request(parts: Parts, team: str, rng: random.Random, *, urgent: bool) -> str:
    """Put one request together; it still has the placeholders ``{item}`` and ``{order}``."""
    middle = [rng.choice(parts.complaints[team]), rng.choice(parts.references)]
    if urgent:
        middle.append(rng.choice(parts.urgent))
    elif rng.random() < 0.6:  # the others say nothing about time
        middle.append(rng.choice(parts.calm))
    rng.shuffle(middle)
    if rng.random() < 0.5:
        middle.insert(0, rng.choice(parts.openings))
    return " ".join(_sentence(part) for part in middle)


def _sentence(part: str) -> str:
    return part[0].upper() + part[1:] + ("" if part.endswith("?") else ".")
