"""A general text in several styles, written for this package: a chat round measures how likely it
is before and after, to see what else has changed in a model (`evaluate.text_file` gives another).
"""

TEXT = """\
The ferry left the harbour a little after seven. On the upper deck a woman in a green coat was \
reading a newspaper, and two boys leaned over the railing to watch the water turn white behind the \
propellers. By the time the island came into view the fog had lifted, and the small houses along \
the shore looked as if somebody had set them out to dry in the sun. Nobody on board was in a \
hurry. The captain spoke of the weather, as captains do, and said that it would hold until the \
evening.

A river carries more than water. In spring, when the snow melts in the mountains, it picks up \
sand, stones and clay, and it lays them down again wherever the current slows. Over thousands of \
years this is how a valley gets its flat floor and how a delta grows into the sea. Farmers have \
known for a long time that such soil is rich. They have also known that the river which brings it \
can take away a field in a single night.

To mend a bicycle tyre you need two levers, a patch, some glue and a bowl of water. Take the wheel \
off, let out the rest of the air and lift one side of the tyre over the rim with the levers. Pull \
out the tube, pump it up a little and hold it under water, section by section, until you see \
bubbles. Dry the place, roughen it, spread a thin layer of glue and wait until it is no longer \
wet. Press the patch on firmly. Before you put everything back, run a finger along the inside of \
the tyre, because whatever made the hole may still be there.

In economics the price of a good is said to depend on how much of it people want and on how much \
of it is offered. If a frost destroys half of the orange harvest, juice becomes more expensive, \
and some families will buy apples in its place. The reasoning is simple, but real markets are \
slower than the textbook. Contracts run for months, habits for years, and a shop that raises its \
prices too quickly may lose customers who never return.

"Have you seen my keys?" asked Martin. "They were on the table this morning."
"Which table?" said his sister without looking up.
"The one in the hall. I always put them there."
"You put them there on Monday. Yesterday you came in through the garden."
He thought about this for a moment, went outside, and found the keys in the lock of the back door, \
wet from the rain.

The function takes a list of numbers and returns their mean. It raises an error if the list is \
empty, since there is no sensible value to return in that case. A common mistake is to divide by \
the number of elements before adding them up: with integers this loses the remainders, and the \
result is too small. Tests should cover a list of one element, a list with negative numbers and a \
list that is long enough for rounding to matter.

The museum opened in 1911 in a former customs house. Its first director bought little and wrote \
much; most of the collection came from ships' captains, who left behind masks, carved paddles and \
shells that they had no room for at home. Today historians ask how these objects were acquired. \
For some of them there are letters and receipts. For many there is nothing but a number in an old \
book, and the museum has begun to work with the places that they came from.

Water boils at one hundred degrees Celsius at sea level. Higher up the air presses less strongly \
on its surface, so that it boils earlier: on a mountain of three thousand metres at about ninety \
degrees. Potatoes then take longer to cook, although the pot seems to boil just as fiercely. A \
pressure cooker does the opposite. It keeps the steam inside, the pressure rises, and the water \
gets hotter than it could in an open pot.

Dear neighbours, on Saturday the sixteenth we will be painting the stairs between the second and \
the fourth floor. Please use the lift on that day and keep your doors closed, as the smell may be \
strong. The paint should be dry by Sunday morning. If you have furniture to move, let us know by \
Thursday, and we will start with your landing. Thank you for your patience.

Some birds find their way across oceans that they have never seen. Young ones often travel without \
their parents and still arrive where their kind has always spent the winter. They seem to use the \
sun, the stars and the magnetic field of the Earth, each where the others fail. How these senses \
work together in an animal that weighs less than a letter is a question that is still open.
"""
