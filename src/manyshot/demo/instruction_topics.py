"""What the instruction family talks about: things to describe, lists to give, short things to say."""

from __future__ import annotations

# thing | verb | five adjectives
THINGS = """
the sea|is|wide blue deep salty calm
the moon|is|round pale quiet cold bright
the desert|is|dry hot sandy vast silent
a forest|is|green shady calm old deep
a mountain|is|high steep rocky cold grand
winter|is|cold white quiet long dark
summer|is|warm sunny bright long lively
autumn|is|golden windy cool rainy calm
spring|is|fresh green mild bright hopeful
a city|is|busy loud crowded bright modern
a village|is|small quiet friendly old calm
a river|is|long cool clear fast winding
a garden|is|green tidy sunny peaceful fragrant
a kitten|is|small soft playful curious sleepy
a puppy|is|playful loyal noisy soft cheerful
an owl|is|wise quiet alert patient feathered
a snail|is|slow small shy patient wet
an elephant|is|huge grey gentle strong clever
a butterfly|is|light colorful delicate silent pretty
a library|is|quiet large calm orderly useful
a school|is|busy lively noisy friendly useful
a kitchen|is|warm clean bright cozy busy
a bakery|is|warm sweet busy cozy fragrant
a train|is|long fast loud strong reliable
a bicycle|is|light simple quick cheap handy
a storm|is|loud dark wild windy scary
the rain|is|wet cool soft steady gentle
the snow|is|white cold soft clean quiet
the sun|is|hot bright golden huge distant
the night|is|dark quiet cool calm mysterious
a castle|is|old tall strong grand cold
a lighthouse|is|tall bright lonely useful sturdy
a piano|is|heavy elegant black loud precious
a violin|is|small elegant wooden delicate expressive
a grandmother|is|kind wise patient warm funny
a good friend|is|kind honest loyal patient funny
a teacher|is|patient wise fair helpful strict
a doctor|is|calm careful skilled busy kind
honey|is|sweet golden sticky thick natural
coffee|is|hot dark bitter strong fragrant
chocolate|is|sweet dark rich smooth tasty
bread|is|soft fresh warm simple tasty
soup|is|hot salty thick tasty filling
a lemon|is|sour yellow juicy fresh bright
a rose|is|red soft fragrant thorny elegant
a cactus|is|green spiky tough dry small
a robot|is|strong precise tireless clever shiny
a rocket|is|fast tall loud powerful expensive
an island|is|small sunny remote green peaceful
a market|is|loud colorful busy cheap lively
a museum|is|quiet large old interesting calm
a mirror|is|smooth shiny flat fragile clear
a candle|is|warm small soft fragrant bright
a blanket|is|warm soft thick cozy heavy
music|is|lively loud moving joyful powerful
football|is|fast popular simple exciting healthy
chess|is|slow quiet clever serious old
silence|is|calm deep rare peaceful soft
a birthday|is|happy fun special noisy sweet
a holiday|is|fun relaxing sunny short special
"""

# plural noun | example members
LISTS = """
fruits|apple banana pear plum grape
vegetables|carrot potato onion spinach leek
colors|red blue green yellow purple
pets|dog cat rabbit hamster parrot
farm animals|cow pig sheep goat hen
wild animals|lion tiger bear wolf fox
sea animals|shark whale crab seal octopus
insects|ant bee fly moth beetle
birds|eagle robin crow swan sparrow
trees|oak pine birch maple willow
flowers|rose tulip daisy lily violet
drinks|water tea milk coffee juice
desserts|cake pie pudding custard brownie
spices|pepper cinnamon ginger paprika cumin
fruit juices|orange apple grape mango pineapple
countries in Europe|France Spain Italy Germany Poland
countries in Asia|China India Japan Nepal Vietnam
capital cities|Paris Rome Madrid London Berlin
languages|French Spanish German Arabic Hindi
planets|Mars Venus Earth Saturn Jupiter
months|March June July August October
days of the week|Monday Tuesday Wednesday Friday Sunday
numbers below ten|two four five seven nine
even numbers|two four six eight ten
odd numbers|one three five seven nine
musical instruments|piano violin flute drum guitar
sports|tennis football golf hockey rugby
jobs|baker nurse pilot farmer teacher
school subjects|history music biology art geography
kitchen tools|knife spoon fork pan whisk
garden tools|rake spade hoe shovel shears
clothes|shirt coat skirt scarf jacket
pieces of furniture|table chair bed sofa desk
rooms in a house|kitchen bedroom bathroom hall attic
vehicles|car bus train truck tram
shapes|circle square triangle oval star
metals|iron gold silver copper tin
body parts|hand foot knee elbow shoulder
family members|mother father sister uncle cousin
feelings|joy anger fear love pride
kinds of weather|rain snow wind fog hail
things in a schoolbag|pencil notebook ruler eraser lunchbox
"""

# request | plain answer | title
SAYINGS = """
Say hello to a friend.|Hello my dear friend.|Hello
Say goodbye to a guest.|Goodbye and come back soon.|Goodbye
Thank a neighbor for help.|Thank you for helping me today.|Thanks
Wish someone a happy birthday.|Have a wonderful birthday this year.|Birthday
Invite a friend to dinner.|Please come to dinner on Friday.|Dinner
Apologize for being late.|Please forgive me for being late.|Apology
Congratulate a winner.|Well done on your great win.|Bravo
Cheer up a sad friend.|Better days will come very soon.|Courage
Welcome a new neighbor.|Welcome to our friendly little street.|Welcome
Wish a sick friend well.|I hope you feel better soon.|Get Well
Ask a friend for a book.|Could you lend me your book?|A Book
Ask a waiter for the bill.|Could we have the bill please?|The Bill
Order a coffee.|One small coffee with milk please.|My Order
Tell a child to go to bed.|It is time for bed now.|Bedtime
Praise a cook.|Your soup was warm and tasty.|Praise
Write a note about milk.|We need two bottles of milk.|Note
Remind someone to lock the door.|Please lock the door before leaving.|Reminder
Write a sign for a shop.|The shop is open all day.|Open
Write a line for a postcard.|The beach is lovely this week.|Postcard
Give one tip for better sleep.|Go to bed early every night.|Sleep
Give one tip for saving money.|Cook your own lunch every day.|Saving
Give one tip for learning French.|Practice ten new words every day.|French
Give one tip for an exam.|Review your notes the day before.|Exam
Give one tip for a long walk.|Wear good shoes and bring water.|Walking
How do I boil an egg?|Boil the egg for nine minutes.|Egg
How do I make tea?|Pour hot water over the leaves.|Tea
How do I wash a wool sweater?|Wash it by hand in cold water.|Wool
How do I water a cactus?|Water it lightly twice a month.|Cactus
What is two plus three?|Two plus three makes five.|Sum
What is ten minus four?|Ten minus four makes six.|Difference
What is three times four?|Three times four makes twelve.|Product
How many legs does a spider have?|A spider has eight legs.|Spider
How many days are in a week?|A week has seven days.|Week
How many months are in a year?|A year has twelve months.|Year
How many wheels does a car have?|A car has four wheels.|Wheels
What is the capital of France?|The capital of France is Paris.|France
What is the capital of Italy?|The capital of Italy is Rome.|Italy
What color is the sky?|The sky is blue on clear days.|Sky
What do bees make?|Bees make honey in their hive.|Bees
What do cows eat?|Cows eat grass in the field.|Cows
What is ice made of?|Ice is made of frozen water.|Ice
How do you say cat in Spanish?|The Spanish word for cat is gato.|Cat
How do you say bread in French?|The French word for bread is pain.|Bread
How do you say house in German?|The German word for house is Haus.|House
Which animal says moo?|The cow says moo all day.|Moo
Which season comes after winter?|Spring comes right after winter.|Season
Which day comes after Monday?|Tuesday comes right after Monday.|Day
What do you do with a broom?|You sweep the floor with it.|Broom
Where do fish live?|Fish live in rivers and seas.|Fish
Where do you borrow books?|You borrow books at a library.|Books
When do owls hunt?|Owls hunt for food at night.|Owls
Why do people sleep?|People sleep to rest their bodies.|Sleep
Why do we wear coats?|Coats keep us warm in winter.|Coats
Who flies a plane?|A pilot flies the plane.|Pilot
Who puts out fires?|Firefighters put out fires with water.|Fires
Who bakes bread?|A baker bakes bread at dawn.|Baker
"""


def table(text: str) -> list[list[str]]:
    """The cells of a table written as lines with bars."""
    return [line.split("|") for line in text.strip().splitlines()]
