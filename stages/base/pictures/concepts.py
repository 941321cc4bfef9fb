"""What the tiny world contains: curated emoji names, colours, tones and words. Data only; `world.py` draws it."""

# Labels in emojibase-data; each has one picture, in the flat Fluent style.
OBJECTS = """
monkey face; dog face; fox; cat face; lion; tiger face; unicorn; cow face; pig face; mouse face; rabbit face; bear; panda; koala;
polar bear; frog; elephant; giraffe; hedgehog; zebra; gorilla; kangaroo; rooster; baby chick; penguin; owl; duck; flamingo; parrot; dove;
crocodile; turtle; snake; spouting whale; dolphin; fish; tropical fish; shark; octopus; crab; lobster; snail; butterfly; honeybee; lady beetle; spider;
cherry blossom; rose; sunflower; tulip; hibiscus; evergreen tree; palm tree; cactus; four leaf clover; maple leaf; mushroom; potted plant;
grapes; watermelon; tangerine; lemon; banana; pineapple; mango; red apple; pear; peach; cherries; strawberry; kiwi fruit; tomato; coconut;
avocado; eggplant; potato; carrot; ear of corn; hot pepper; cucumber; broccoli; garlic; onion; bread; croissant; pretzel; pancakes; cheese wedge;
hamburger; french fries; pizza; hot dog; taco; egg; popcorn; sushi; rice ball; soft ice cream; doughnut; cookie; birthday cake; cupcake; pie; candy; lollipop;
honey pot; hot beverage; teapot; wine glass; beer mug; cup with straw; spoon; globe showing Americas; volcano; snow-capped mountain; house; castle; tent; hospital;
locomotive; bus; ambulance; fire engine; police car; taxi; automobile; tractor; racing car; motor scooter; bicycle; skateboard; stop sign; anchor; sailboat; ship;
airplane; helicopter; parachute; rocket; flying saucer; watch; alarm clock; hourglass done; crescent moon; full moon; sun; sun with face; ringed planet; star; cloud;
cloud with rain; cloud with snow; tornado; rainbow; umbrella with rain drops; snowflake; snowman; fire; droplet; jack-o-lantern; Christmas tree; balloon; wrapped gift;
trophy; 1st place medal; soccer ball; baseball; basketball; american football; tennis; bowling; boxing glove; kite; pool 8 ball; game die; puzzle piece; teddy bear;
artist palette; yarn; glasses; sunglasses; necktie; t-shirt; jeans; scarf; gloves; socks; dress; backpack; running shoe; high-heeled shoe; crown; top hat; graduation cap;
ring; gem stone; bell; musical note; microphone; headphone; radio; saxophone; trumpet; guitar; violin; drum; mobile phone; telephone; battery; laptop; computer mouse;
floppy disk; movie camera; television; camera; candle; light bulb; open book; closed book; newspaper; money bag; envelope; package; pencil; paintbrush; calendar;
scissors; locked; key; hammer; axe; wrench; screwdriver; gear; magnet; ladder; bomb; bow and arrow; shield; telescope; microscope; syringe; pill; door; bed; chair; toilet;
broom; bucket; soap; toothbrush; ghost; alien; robot; pile of poo; clown face; skull; grinning face; smiling face with sunglasses; angry face; crying face; sleeping face;
nerd face; partying face; cowboy hat face; thinking face; smiling face with heart-eyes; red heart; broken heart; eyes; brain; tooth; bone; speech balloon; high voltage
"""

# Objects to paint in one colour: their shape alone still shows what they are.
PAINTABLE = """
red apple; pear; banana; strawberry; cherries; rose; tulip; sunflower; maple leaf; mushroom; cactus; evergreen tree; balloon; umbrella with rain drops; t-shirt; dress; scarf;
gloves; socks; backpack; running shoe; high-heeled shoe; necktie; top hat; crown; automobile; bus; tractor; bicycle; motor scooter; rocket; airplane; sailboat; house; castle; tent;
alarm clock; bell; guitar; drum; camera; television; telephone; laptop; key; locked; hammer; wrench; scissors; gear; shield; bucket; chair; door; star; red heart;
cat face; dog face; rabbit face; bear; frog; owl; butterfly; fish; octopus; turtle; snail; elephant; ghost; robot; cupcake; doughnut; teapot; wine glass; wrapped gift; envelope
"""

# People and hands that come in five skin tones (the unmarked form is yellow).
TONED = """
waving hand; raised hand; OK hand; victory hand; sign of the horns; call me hand; thumbs up; thumbs down; raised fist; clapping hands; raising hands; folded hands;
flexed biceps; leg; foot; ear; nose; baby; boy; girl; old man; old woman; farmer; astronaut; firefighter; police officer; mage; Santa Claus
"""
TONES = ["light", "medium-light", "medium", "medium-dark", "dark"]
HAIRED = ["man", "woman"]
HAIR = {"red": "red hair", "curly": "curly hair", "white": "white hair", "bald": "bald", "blond": "blond hair"}

COLOURS = {
    "red": (222, 40, 48),
    "orange": (245, 130, 25),
    "green": (40, 165, 70),
    "blue": (35, 110, 225),
    "purple": (140, 60, 200),
    "pink": (245, 115, 175),
    "brown": (135, 85, 50),
}
BACKGROUNDS = {
    "yellow": (255, 232, 130),
    "green": (185, 232, 180),
    "blue": (175, 212, 250),
    "pink": (252, 200, 222),
    "gray": (205, 208, 212),
}
INKS = {"black": (20, 20, 20), "red": (205, 30, 35), "blue": (25, 75, 200), "green": (20, 130, 55)}

# English words for the text task. `world.py` chooses the held-out words, which training never shows.
WORDS = """
AM AN AS AT BE BY DO GO HE HI IF IN IS IT ME MY NO OF OH OK ON OR OX PI SO TO UP US WE
ACE ACT ADD AGE AIM AIR ANT APE ARM ART ASH ATE BAD BAG BAR BAT BAY BED BEE BET BIG BIN BIT BOW BOX BOY BUD BUG BUS BUY CAB CAP CAR CAT COD COG COW CRY CUB CUP CUT
DAD DAM DAY DEN DEW DIG DOG DOT DRY DUO EAR EAT EEL EGG ELF ELK END EYE FAN FAR FAT FIG FIN FIX FLY FOG FOX FUN FUR GAP GAS GEM GET GUM GUY GYM HAM HAT HAY HEN HIP HIT HOP HOT HUG HUT
ICE INK INN IVY JAM JAR JAW JET JOB JOG JOY JUG KEY KID KIT LAB LAP LAW LEG LID LIP LOG LOT LOW MAP MAT MAX MIX MOB MOM MUD MUG NAP NET NEW NOD NUT OAK OAR OIL OLD ONE OUR OUT OWL OWN
PAD PAN PAW PAY PEA PEN PET PIE PIG PIN PIT POD POT PUB PUP RAG RAM RAT RAW RAY RED RIB RIM ROD ROW RUB RUG RUN SAD SAW SEA SEE SET SHY SIP SIX SKI SKY SON SPA SPY SUM SUN TAG TAP TAX TEA TEN TIE TIN TIP TOE TOP TOY TRY TUB
URN USE VAN VET VOW WAX WEB WET WIG WIN WIT YAK YAM YES YET ZAP ZEN ZIP ZOO
ABLE ACID ARCH AREA ATOM AUNT AWAY BABY BACK BAKE BALL BAND BANK BARN BATH BEAM BEAN BEAR BELL BELT BIRD BLUE BOAT BODY BOLD BONE BOOK BOOT BOWL BRAN BULB BUSH CAFE CAGE CAKE CALM CAMP CARD CARE CART CASH CAVE CHEF CITY CLAY CLUB COAL COAT CODE COIN COLD COOK COOL CORN COZY CRAB CREW CROW CUBE
DARK DAWN DEER DESK DICE DISH DIVE DOCK DOOR DOVE DRUM DUCK DUNE DUST EACH EARN EAST EASY ECHO EDGE EPIC EURO EVEN EXIT FACE FACT FARM FAST FEEL FERN FILM FIRE FISH FIVE FLAG FLAT FOAM FOLK FOOD FOOT FORK FORT FOUR FREE FROG FUEL GAME GATE GIFT GIRL GLAD GLOW GLUE GOAL GOAT GOLD GOLF GOOD GRAY GREY GULF
HAIR HALF HALL HAND HARP HAWK HEAT HERB HERO HIGH HIKE HILL HIVE HOME HOPE HORN HOUR ICON IDEA INCH IRIS IRON ISLE ITEM JADE JAZZ JOIN JOKE JUMP JURY KEEP KIND KING KITE KIWI KNEE KNOT LACE LADY LAKE LAMB LAMP LAND LAVA LAZY LEAF LEMO LIFE LIME LINE LION LOCK LOVE LUCK LUNG
MAIN MAKE MANY MARK MASK MATH MAZE MEAL MELT MENU MILK MINE MINT MIST MOON MOSS MOTH MOVE MUCH NAVY NEAR NECK NEST NEWS NICE NINE NOON NOSE NOTE OATS OBOE ONCE ONLY OPEN OVAL OVEN PACK PAGE PALM PARK PATH PEAK PEAR PINE PINK PIPE PLAN PLAY PLUM POEM POET POND PONY POOL PORT QUIZ RACE RAIN REEF RICE RING RISE ROAD ROCK ROOF ROOM ROPE ROSE RUBY
SAFE SAIL SALT SAND SEAL SEED SHIP SHOE SHOP SHOW SILK SING SIZE SNOW SOAP SOCK SOFA SOIL SONG SOUP STAR STEM STEP SWAN SWIM TAIL TALL TANK TAXI TEAM TENT TIDE TIME TINY TOAD TOOL TOWN TREE TRIP TUBE TUNA TURN TWIN UNIT VASE VERY VIEW VINE VOTE WALK WALL WARM WAVE WEEK WEST WHEY WILD WIND WING WISE WOLF WOOD WOOL WORD WORK YARD YARN YEAR YOGA ZERO ZONE ZOOM
"""


def names(block: str) -> list[str]:
    """Split one of the blocks above at semicolons (labels) into clean names."""
    return [" ".join(part.split()) for part in block.split(";") if part.strip()]


def words() -> list[str]:
    """The English words of the text task, 2 to 4 capital letters, sorted."""
    return sorted(set(WORDS.split()))
